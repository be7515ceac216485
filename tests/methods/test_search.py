"""Format search: the best split for each tensor, and what reports say of it."""

import dataclasses

import pytest
import torch
from torch import nn

from dq.distance import sqnr
from dq.engine import quantize
from dq.errors import DQError
from dq.family import family_of
from dq.formats import FloatFormat, formats
from dq.methods.ptq import PTQ
from dq.methods.search import FormatSearch, splits
from dq.nn import packed_layers
from dq.quantize import choose_scales, fake_quantize
from dq.recipe import Recipe
from tests.models import MODELS
from tests.sources import Samples

BASE = PTQ("e2m1", "e4m3", "static", wide="e4m3", input_observer="absmax")


def network(name: str) -> nn.Module:
    return MODELS[name].network(MODELS[name].build()).eval()


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("e4m3", ("e1m6", "e2m5", "e3m4", "e4m3", "e5m2")),
        ("e2m1", ("e1m2", "e2m1", "e3m0")),
        ("e3m2", ("e1m4", "e2m3", "e3m2", "e4m1", "e5m0")),
        ("ue4m4", ("ue2m6", "ue3m5", "ue4m4", "ue5m3")),
    ],
)
def test_splits_are_all_of_as_many_bits(name: str, found: tuple[str, ...]) -> None:
    grid = formats[name]
    assert isinstance(grid, FloatFormat)
    assert splits(grid) == found
    assert {formats[other].bits for other in found} == {grid.bits}


@pytest.mark.parametrize("name", ["sd32", "dit64"])
def test_each_weight_has_the_split_of_least_error(name: str) -> None:
    model, plain = network(name), network(name)
    plan = quantize(model, Recipe("t", (BASE, FormatSearch())), Samples(model))
    base = quantize(plain, Recipe("t", (BASE,)), Samples(plain))
    assert plan.layers.keys() == base.layers.keys()
    reference = network(name)
    chosen = set()
    for layer, spec in plan.layers.items():
        matrix = reference.get_submodule(layer).weight.detach().flatten(1)
        before = base.layers[layer].weight

        def quality(format: str, matrix=matrix, before=before) -> float:
            tried = dataclasses.replace(before, format=format, observer="mse")
            return sqnr(fake_quantize(matrix, choose_scales(matrix, tried), tried), matrix)

        best = max(splits(before.grid), key=quality)
        assert quality(spec.weight.format) == pytest.approx(quality(best))
        assert spec.weight.grid.bits == before.grid.bits
        assert spec.input.grid.bits == 8
        chosen |= {spec.weight.format, spec.input.format}
    assert len(chosen) > 2


def test_searched_formats_are_better_for_the_whole_model_and_called_emulated() -> None:
    model, plain, reference = network("dit64"), network("dit64"), network("dit64")
    base = dataclasses.replace(BASE, weights="e4m3")
    quantize(model, Recipe("t", (base, FormatSearch())), Samples(model))
    quantize(plain, Recipe("t", (base,)), Samples(plain))
    found = [sqnr(source_output(m), source_output(reference)) for m in (model, plain)]
    assert found[0] > found[1] + 3
    paths = {layer.path() for layer in packed_layers(model).values()}
    assert any("emulated" in path for path in paths)
    assert not any("emulated" in layer.path() for layer in packed_layers(plain).values())


@torch.no_grad()
def source_output(model: nn.Module) -> torch.Tensor:
    call = family_of(model).sample_inputs(model, 4, torch.Generator().manual_seed(77))
    return model(**call, return_dict=False)[0]


def test_ranges_that_are_chosen_reach_the_layers() -> None:
    model = network("dit64")
    plan = quantize(model, Recipe("t", (BASE, FormatSearch(clips=(0.5,)))), Samples(model))
    whole = network("dit64")
    quantize(whole, Recipe("t", (BASE, FormatSearch(clips=(1.0,)))), Samples(whole))
    same = 0
    for name, spec in plan.layers.items():
        one, other = packed_layers(model)[name], packed_layers(whole)[name]
        if one.spec.input == other.spec.input:
            assert torch.allclose(one.input_affine[:, 0] * 2, other.input_affine[:, 0])
            same += 1
        assert spec.is_static
    assert same


def test_recipes_by_name() -> None:
    names = [type(step).__name__ for step in Recipe.get("fp-search-w4a8").steps]
    assert names == ["PTQ", "FormatSearch", "BOS", "AdaRound"]
    assert [type(s).__name__ for s in Recipe.get("fp-search-w8a16-rtn").steps] == [
        "PTQ",
        "FormatSearch",
    ]
    names = [type(step).__name__ for step in Recipe.get("fp-search-w8a8").steps]
    assert names == ["PTQ", "FormatSearch", "BOS"]  # so many bits leave nothing to learn
    step = Recipe.get("fp-search-w6a8-gptq").steps[0]
    assert (step.weights, step.inputs) == ("e3m2", "e4m3")
    with pytest.raises(DQError, match="unknown recipe 'fp-search-w9a8'"):
        Recipe.get("fp-search-w9a8")


@pytest.mark.parametrize("clips", [(), (0.0,), (1.5,)])
def test_clips_out_of_range_are_refused(clips: tuple[float, ...]) -> None:
    with pytest.raises(DQError, match="clips lists shares"):
        FormatSearch(clips)
