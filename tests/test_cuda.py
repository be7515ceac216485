"""On a card: what was quantized on the CPU computes the same there, and quantizing works there."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from dq import DQPipeline, Recipe
from dq.calibrate import CalibrationSpec
from dq.calls import run
from dq.nn import PackedLayer, packed_layers
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
@torch.no_grad()
def test_layers_on_the_card_compute_what_they_simulate(name: str, recipe: str) -> None:
    """Layer by layer: through a whole network, inputs that lie on a tie round either way."""
    pipe = quantized(name, recipe, torch.float32, device_map="cuda")
    network, far = CASES[name].network(pipe), {}

    def compare(title: str, layer: PackedLayer, args: tuple[torch.Tensor], y: torch.Tensor) -> None:
        wanted = layer.simulate(args[0], layer.bias)
        if (error := relative_error(y, wanted)) > 8e-3:  # fp8 products are bfloat16
            far[title] = error

    for title, layer in packed_layers(network).items():
        layer.register_forward_hook(partial(compare, title))
    assert answer(network, met(name)).isfinite().all()
    assert not far


@names
@recipes
def test_a_pipeline_moved_to_the_card_is_as_good(name: str, recipe: str) -> None:
    expected = answer(CASES[name].network(CASES[name].build()), met(name))
    pipe = quantized(name, recipe, torch.float32)
    network = CASES[name].network(pipe)
    error = relative_error(answer(network, met(name)), expected)
    pipe.to("cuda")
    assert relative_error(answer(network, met(name)), expected) < 1.1 * error + 1e-3


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
