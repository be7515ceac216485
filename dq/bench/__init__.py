"""How fast denoisers run, quantized and not: `dq bench`.

All forms of a model run in one process, in turn, and every one at its best, the baselines first of
all. What is reported is what happened, also where quantization makes a model slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dq.bench.models import RANDOM_MODELS, Checkpoint, RandomModel, Subject, subject
from dq.bench.peers import peers
from dq.bench.profile import Operator, operators, products
from dq.bench.report import Machine, Measurement, Report
from dq.bench.timing import Times, interleave, threads_set
from dq.bench.variants import BASELINE, COMPILED, REFERENCE, Variant, pipelines, variants
from dq.errors import DQError
from dq.family import quantizable
from dq.memory import peak_growth, peak_on_card
from dq.pipelines.footprint import footprint
from dq.recipe import Recipe

__all__ = [
    "MODELS",
    "RECIPES",
    "Checkpoint",
    "Machine",
    "Measurement",
    "Operator",
    "RandomModel",
    "Report",
    "run",
]

MODELS = tuple(RANDOM_MODELS)
RECIPES = ("w8a8", "w8a8-static", "w8a8-dynamic", "w4a8", "w4a16")
_OPERATORS = 12  # that a report keeps of each variant


def run(
    models: Sequence[str | Subject] = MODELS,
    recipes: Sequence[str] = RECIPES,
    threads: int = 1,
    repeats: int = 15,
    batch: int = 2,
    seed: int = 0,
    device: str = "cpu",
    compiled: bool = False,
    against: Sequence[str] = (),
    steps: int = 0,
) -> Report:
    """Measure denoisers in float32, in bfloat16 and by recipes.

    Args:
        models: "unet" (51.5 M weights) and "dit" (85.1 M) with random weights; folders, hub names,
            or checkpoints of dq such as "emoji-unet".
        recipes: Names or files.
        threads: Of torch; restored afterwards.
        repeats: Rounds; each runs every variant once.
        batch: Images in a forward call.
        seed: Of weights, inputs and calibration.
        device: Where the models run; ranges are found on the CPU.
        compiled: Whether bf16 and recipes compete a second time, compiled as a whole.
        against: Names of peers, see `dq.bench.peers`; "all" are those that are installed.
        steps: If not 0, checkpoints draw whole batches of images in so many steps, and that is
            what is measured instead of a forward call.

    Raises:
        DQError: For unknown models and recipes, before anything is measured where possible.
    """
    if repeats < 1 or threads < 1 or batch < 1:
        raise DQError(f"repeats, threads and batch are at least 1: {repeats}, {threads}, {batch}")
    if steps and (compiled or against):
        raise DQError("whole pipelines are measured as they are: without compiled forms and peers")
    asked = [Recipe.get(recipe) for recipe in recipes]
    others = peers(tuple(against))
    machine = Machine.here(threads, device)
    measured = {}
    with threads_set(threads):
        for each in map(subject, models):
            if steps:
                competitors = pipelines(each, asked, batch, steps, seed, device)
            else:
                competitors = variants(each, asked, batch, seed, device, compiled, others)
            measured[each.name] = _measure(each.name, competitors, repeats)
    settings: dict[str, int | str] = {
        "batch": batch,
        "repeats": repeats,
        "seed": seed,
        "device": device,
        **({"steps": steps} if steps else {}),
    }
    return Report(machine, settings, measured)


def _measure(title: str, competitors: Sequence[Variant], repeats: int) -> dict[str, Measurement]:
    outputs = {variant.name: variant().float() for variant in competitors}
    twins = _twins(competitors, outputs)
    runs = {variant.name: variant for variant in competitors if variant.name not in twins}
    times = interleave(runs, repeats, f"measuring {title}")
    found = {
        name: _measurement(
            variant, times[name], times[_baseline(name)], outputs[name], outputs[REFERENCE]
        )
        for name, variant in runs.items()
    }
    for name, twin in twins.items():
        found[name] = replace(found[twin], note=f"the same as {twin}")
    return {variant.name: found[variant.name] for variant in competitors}


def _baseline(name: str) -> str:
    """Return what a variant is compared with: bf16 of the same mode."""
    return BASELINE + COMPILED if name.endswith(COMPILED) else BASELINE


def _twins(competitors: Sequence[Variant], outputs: dict[str, Tensor]) -> dict[str, str]:
    """Return recipes that made the very model of an earlier one: they are measured once."""
    twins: dict[str, str] = {}
    for index, variant in enumerate(competitors):
        layers = footprint(variant.model).layers
        for earlier in competitors[:index]:
            mode = variant.name.endswith(COMPILED) == earlier.name.endswith(COMPILED)
            same = mode and layers and layers == footprint(earlier.model).layers
            if same and torch.equal(outputs[variant.name], outputs[earlier.name]):
                twins[variant.name] = twins.get(earlier.name, earlier.name)
                break
    return twins


def _measurement(
    variant: Variant, times: Times, baseline: Times, output: Tensor, reference: Tensor
) -> Measurement:
    ran = operators(variant)
    count = footprint(variant.model)
    growth = peak_on_card(variant) if output.is_cuda else peak_growth(variant)
    stored, resident = count.stored_bytes, count.resident_bytes  # 0: a peer that does not tell
    return Measurement(
        milliseconds=times.milliseconds,
        spread=times.spread,
        ratio_to_bf16=times.milliseconds / baseline.milliseconds,
        cpu_milliseconds=times.cpu_milliseconds,
        cpu_ratio_to_bf16=times.cpu_milliseconds / baseline.cpu_milliseconds,
        relative_error=float((output - reference).norm() / reference.norm()),
        stored_megabytes=stored / 1e6 if stored else None,
        resident_megabytes=resident / 1e6 if stored else None,
        peak_megabytes=(resident + growth) / 1e6 if stored and growth is not None else None,
        compute_paths=_compute_paths(variant),
        layout="channels_last" if variant.channels_last else "contiguous",
        note=products(ran),
        operators=ran[:_OPERATORS],
    )


def _compute_paths(variant: Variant) -> dict[str, int]:
    """Return the number of layers by path, those that stay in floating point included."""
    count = footprint(variant.model)
    paths = {path: layers for path, (layers, _) in count.paths().items()}
    if not any(p.is_floating_point() for p in variant.model.parameters()):
        return paths  # a peer's graph
    plain = len(quantizable(variant.model)) - len(count.layers)
    if plain:
        dtype = next(p.dtype for p in variant.model.parameters() if p.is_floating_point())
        paths[f"{str(dtype).removeprefix('torch.')}, stock kernel"] = plain
    return paths
