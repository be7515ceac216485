"""The one driver: observe, decide, install, tune for each step of a recipe, then pack."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from dq import attention, runtime
from dq.calibrate import Calibration, Source
from dq.errors import DQError
from dq.family import family_of
from dq.method import Job, Method
from dq.nn import QuantLayer, install, pack_model, packed_layers, uninstall
from dq.nn.fold import fold
from dq.plan import Plan
from dq.recipe import Recipe
from dq.work import Work, fingerprint

__all__ = ["decide", "quantize", "start"]

logger = logging.getLogger("dq")


def decide(model: nn.Module, recipe: Recipe) -> Plan:
    """Return the plan of a recipe without running the model, which may lie on the meta device.

    If the plan is static, its ranges are still to be found; see `quantize`.

    Raises:
        NeedsData: If a step of the recipe needs data to decide.
    """
    job = start(model, recipe, None, None)
    for method in recipe.steps:
        method.observe(job)
        job.plan = method.decide(job)
    return job.plan


def quantize(
    model: nn.Module, recipe: Recipe, source: Source | None = None, work: Path | None = None
) -> Plan:
    """Quantize a denoiser in place and pack it.

    Args:
        model: The denoiser, with float weights.
        recipe: What to do.
        source: Makes the denoiser run for calibration; may be None for data-free recipes.
        work: Folder for finished stages; the same job started again continues there. None uses a
            temporary one.

    Returns:
        The plan. If anything fails, the model is left as it was.
    """
    if work is not None:
        identity = {} if source is None else source.identity(recipe.calibration)
        folder = work / fingerprint(model, {**recipe.to_dict(), "source": identity})
        return _run(start(model, recipe, source, folder), recipe)
    # Stages are kept all the same: what a later step sees must not depend on `work`.
    with tempfile.TemporaryDirectory(prefix="dq-") as temporary:
        return _run(start(model, recipe, source, Path(temporary)), recipe)


def _run(job: Job, recipe: Recipe) -> Plan:
    model = job.model
    training = model.training
    model.eval()
    try:
        for method in recipe.steps:
            method.observe(job)
            job.plan = method.decide(job)
            if type(method).tune is not Method.tune:
                _install(job)
                method.tune(job)
        _install(job)
        pack_model(model)
        job.plan = fold(model, job.plan, job.family.fed(model))
        runtime.install(model, job.plan.attention)
    except BaseException:
        uninstall(model)
        runtime.uninstall(model)
        raise
    finally:
        model.train(training)
    for name, note in job.plan.notes.items():
        logger.info("%s: %s", name, note)
    return job.plan


def start(model: nn.Module, recipe: Recipe, source: Source | None, folder: Path | None) -> Job:
    """Return the carrier of a job that is about to begin.

    Args:
        model: The denoiser, with float weights.
        recipe: What is asked for.
        source: Makes the denoiser run; None if nothing does.
        folder: For finished stages; None keeps none.

    Raises:
        DQError: If the model is quantized already, or carries adapters.
    """
    if packed_layers(model) or attention.specs_of(model):
        raise DQError(
            f"this {type(model).__name__} is quantized already; "
            "start from the float checkpoint, or call its dequantize() first"
        )
    if any(name.endswith(".base_layer") for name, _ in model.named_modules()):
        raise DQError(
            f"this {type(model).__name__} carries LoRA adapters, which would be packed as its own "
            "layers; call unload_lora_weights() first (after fuse_lora() to keep their effect)"
        )
    plan = Plan(type(model).__name__, {})
    calibration = Calibration(model, source, recipe.calibration, Work(folder))
    generator = torch.Generator().manual_seed(recipe.calibration.seed)
    return Job(model, family_of(model), plan, calibration, generator=generator)


def _install(job: Job) -> None:
    """Make the model simulate what the plan says.

    Layers that are simulated so already keep their weights and their ranges: they may be tuned.
    """
    there = {n: m.spec.core for n, m in job.model.named_modules() if isinstance(m, QuantLayer)}
    changed = {n: spec for n, spec in job.plan.layers.items() if there.get(n) != spec.core}
    # A range that a step has chosen is not looked for, if its format is still the one it is for; a
    # token to be kept always is.
    chosen = {
        n: job.ranges[n].range
        for n, s in changed.items()
        if n in job.ranges and job.ranges[n].spec == s.input and not s.kept_every
    }
    rest = {n: spec for n, spec in changed.items() if n not in chosen}
    transforms = {n: t for n, t in job.transforms.items() if _has_transform(job.plan, n)}
    ranges = job.calibration.input_ranges(replace(job.plan, layers=rest), transforms)
    install(job.model, job.plan, transforms=transforms)
    attention.change(job.model, job.plan.attention, job.tokens)
    for name, range in {**ranges, **chosen}.items():
        layer = job.model.get_submodule(name)
        assert isinstance(layer, QuantLayer)  # installed above
        layer.set_input(*range)


def _has_transform(plan: Plan, name: str) -> bool:
    """Whether a layer's input is changed; a later step may have decided otherwise."""
    return name in plan.layers and plan.layers[name].transform is not None
