"""Quantized forms of the tiny pipelines, and of the trained checkpoints if they are installed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from dq import DQError, checkpoints
from dq.calls import run
from dq.family import family_of
from tests.models import MODELS, ModelCase
from tests.models.parts import finish

__all__ = [
    "CASES",
    "FOLDERS",
    "RECIPES",
    "forward",
    "met",
    "relative_error",
    "same_state",
    "static",
]


def static(weight_bits: int) -> dict[str, Any]:
    """Returns a recipe with calibrated inputs that is cheap: two images of two steps."""
    step = {
        "method": "ptq", "weights": f"int{weight_bits}", "inputs": "int8", "dynamic": "static",
    }  # fmt: skip
    calibration = {"n": 2, "steps": 2, "batch": 2}
    return {"name": f"w{weight_bits}a8-small", "steps": [step], "calibration": calibration}


RECIPES: Mapping[str, str | dict[str, Any]] = MappingProxyType(
    {
        "w8a8-dynamic": "w8a8-dynamic",  # on the fly
        "w4a8-static": static(4),  # in place
        "w4a16": "w4a16",  # on the fly; unpacks
    }
)


def _load(folder: Path) -> DiffusionPipeline:
    return finish(DiffusionPipeline.from_pretrained(folder))


def _trained() -> tuple[dict[str, ModelCase], dict[str, Path]]:
    common = {"num_inference_steps": 2, "output_type": "np"}
    arguments = {
        "emoji-unet": ("unet", {"prompt": "red apple"}),
        "emoji-dit": ("transformer", {"class_labels": [7]}),
    }
    cases, folders = {}, {}
    for name, (denoiser, condition) in arguments.items():
        try:
            folder = checkpoints.path(name)
        except DQError:
            continue  # not made yet
        cases[name] = ModelCase(name, partial(_load, folder), denoiser, common | condition)
        folders[name] = folder
    return cases, folders


_TRAINED, FOLDERS = _trained()
"""Folders of the trained checkpoints that are installed."""

CASES: Mapping[str, ModelCase] = MappingProxyType({**MODELS, **_TRAINED})
"""The tiny pipelines, then the trained ones."""


def forward(model: nn.Module, **overrides: Any) -> torch.Tensor:
    """Returns the output of a denoiser for one fixed random input, float32."""
    inputs = family_of(model).sample_inputs(model, 1, torch.Generator().manual_seed(0))
    with torch.no_grad():
        return run(model, inputs | overrides).float()


@cache
def met(name: str) -> Mapping[str, Any]:
    """Returns the inputs that the denoiser of a case meets last when its pipeline draws.

    Static scales of a trained network promise something for such inputs only: with random latents
    and text states, which it never met, `emoji-unet` saturates (0.13 off instead of 0.04).
    """
    pipe, seen = CASES[name].build(), []
    network = CASES[name].network(pipe)
    parameters = inspect.signature(type(network).forward)

    def note(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(parameters.bind(model, *args, **kwargs).arguments)

    with network.register_forward_pre_hook(note, with_kwargs=True):
        CASES[name].call(pipe)
    return {key: value for key, value in seen[-1].items() if key not in ("self", "return_dict")}


def relative_error(output: torch.Tensor, reference: torch.Tensor) -> float:
    """Returns the L2 distance over the L2 norm of the reference."""
    return float((output - reference).norm() / reference.norm())


def same_state(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models hold the same tensors: names, dtypes and bits."""
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(
        x[name].dtype == y[name].dtype and torch.equal(x[name], y[name]) for name in x
    )
