"""On a card: what was quantized on the CPU computes the same there, and quantizing works there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from dq import DQPipeline, Recipe
from dq.calibrate import CalibrationSpec, run
from tests.packed import CASES, FOLDERS, met, relative_error

pytestmark = pytest.mark.gpu

_SMALL = CalibrationSpec(n=2, steps=2, batch=2)
_RECIPES = (
    "w8a8-dynamic", "w8a8-static", "w4a8-dynamic", "w4a8-static", "w6a8-dynamic",
    "w8a16", "w4a16", "ternary-a16", "binary-x2-a16",
    "fp8", "fp8-w8a16", "fp4-w4a8", "nvfp4", "nvfp4-a16", "mxfp4", "mxfp8",
    "paro-50-b16", "paro-50-int8-b16",
)  # fmt: skip
recipes = pytest.mark.parametrize("recipe", _RECIPES)
names = pytest.mark.parametrize("name", sorted(FOLDERS))


def quantized(name: str, recipe: str, dtype: torch.dtype, **place: Any) -> DQPipeline:
    small = replace(Recipe.get(recipe), calibration=_SMALL)
    return DQPipeline.from_pretrained(FOLDERS[name], small, dtype=dtype, **place)


def moved(inputs: Any) -> dict[str, Any]:
    return {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


@torch.no_grad()
def answer(model: nn.Module, inputs: Any) -> torch.Tensor:
    place = next(model.parameters()).device
    return run(model, moved(inputs) if place.type == "cuda" else inputs).float().cpu()


@names
@recipes
def test_a_pipeline_moved_to_the_card_computes_what_it_computed(name: str, recipe: str) -> None:
    """Sums run in another order, so that some inputs round to the other side: not bit for bit."""
    pipe = quantized(name, recipe, torch.float32)
    network = CASES[name].network(pipe)
    expected = answer(network, met(name))
    pipe.to("cuda")
    found = answer(network, met(name))
    assert found.isfinite().all()
    assert relative_error(found, expected) < 0.02


@names
@recipes
def test_quantizing_on_the_card_is_as_good(name: str, recipe: str) -> None:
    expected = answer(CASES[name].network(CASES[name].build()), met(name))
    errors = []
    for place in ({}, {"device_map": "cuda"}):
        pipe = quantized(name, recipe, torch.float32, **place)
        errors.append(relative_error(answer(CASES[name].network(pipe), met(name)), expected))
    assert errors[1] < 1.1 * errors[0] + 1e-3


@names
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", ["w4a8", "fp8", "paro-50-b16"])
def test_it_draws_there(name: str, dtype: torch.dtype, recipe: str) -> None:
    pipe = quantized(name, recipe, dtype, device_map="cuda")
    images = CASES[name].call(pipe)
    assert torch.as_tensor(images).isfinite().all()
