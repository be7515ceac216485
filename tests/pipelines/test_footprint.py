"""Bytes and bits are what the tensors hold."""

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from dq.engine import quantize
from dq.nn import keep_int8, packed_layers
from dq.pipelines.footprint import footprint
from dq.recipe import Recipe
from tests.models import ModelCase


def held(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def test_float_model(model_case: ModelCase, model_pipe: DiffusionPipeline) -> None:
    model = model_case.network(model_pipe)
    count = footprint(model)
    assert count.layers == ()
    assert count.average_weight_bits == 0
    assert count.stored_bytes == count.float_bytes == count.planned_bytes == held(model)


@pytest.mark.parametrize("recipe", ["w8a8-dynamic", "w4a8-dynamic", "w4a16", "w3a16", "w6a16"])
def test_packed_model(model_case: ModelCase, model_pipe: DiffusionPipeline, recipe: str) -> None:
    model = model_case.network(model_pipe)
    before = held(model)
    parameters = sum(p.numel() for p in model.parameters())
    quantize(model, Recipe.get(recipe))
    count = footprint(model)
    assert count.parameters == parameters
    assert count.float_bytes == before
    assert count.stored_bytes == count.planned_bytes == count.resident_bytes == held(model)
    assert {layer.name for layer in count.layers} == set(packed_layers(model))
    total = sum(layer.weights for layer in count.layers)
    stored = sum(layer.bytes for layer in count.layers)
    assert count.average_weight_bits == pytest.approx(8 * stored / total)
    assert sum(n for n, _ in count.paths().values()) == len(count.layers)


@pytest.mark.parametrize("model_case", ["sd32"], indirect=True)
def test_expanded_copies_count_as_resident(
    model_case: ModelCase, model_pipe: DiffusionPipeline
) -> None:
    model = model_case.network(model_pipe)
    quantize(model, Recipe.get("w4a8-dynamic"))
    keep_int8(model, True)
    with torch.no_grad():
        model_case.call(model_pipe)
    count = footprint(model)
    if any("oneDNN" in layer.compute_path for layer in count.layers):
        assert count.resident_bytes > count.stored_bytes + sum(x.weights for x in count.layers) / 4
