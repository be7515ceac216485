"""Salience balancing: numbers worked out by hand, and a model that stays as it is."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import nn

from dq.distance import relative_error
from dq.engine import quantize, start
from dq.family import Role, family_of
from dq.inputs import ChannelRange, Seen
from dq.methods.changes import Site
from dq.methods.ptq import PTQ
from dq.methods.salience import Salience, rank_correlation, salience
from dq.methods.smoothquant import SmoothQuant, largest_weights
from dq.nn import packed_layers
from dq.plan import LayerSpec
from dq.presets import input_preset, weight_preset
from dq.recipe import Recipe
from dq.transform import NO_TRANSFORM, Transform
from tests.models import MODELS
from tests.sources import Samples

INT4 = LayerSpec(weight_preset("int4"), input_preset("int4", dynamic=True))
WEIGHTS = torch.tensor([1.0, 2.0, 3.0])
BY_STEP = torch.tensor([[4.0, 5.0, 6.0], [9.0, 8.0, 1.0]])  # like the weights, and the other way


def site(by_step: torch.Tensor, layers: dict[str, nn.Module]) -> Site:
    reach = by_step.amax(0)
    ends = ChannelRange(-reach, reach)
    specs = dict.fromkeys(layers, INT4)
    return Site(layers, specs, Seen(ends, ends, by_step, by_step), NO_TRANSFORM)


@given(st.integers(2, 300), st.integers(0, 99))
def test_rank_correlations_are_those_of_scipy(n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(3, n, generator=generator), torch.randn(n, generator=generator)
    x[0] += y
    found = rank_correlation(x, y)
    assert found.shape == (3,)
    for row, rho in zip(x, found, strict=True):
        assert float(rho) == pytest.approx(spearmanr(row.numpy(), y.numpy()).statistic, abs=1e-9)


def test_ranks_are_all_that_counts() -> None:
    x = torch.tensor([0.1, 3.0, 200.0, 7.0])
    assert rank_correlation(x, x.log()) == 1
    assert rank_correlation(x, -x) == -1
    # Ranks 0 1 3 2 and 1 0 3 2: d is 1, 1, 0, 0.
    assert float(rank_correlation(x, torch.tensor([2.0, 1.0, 4.0, 3.0]))) == pytest.approx(0.8)
    many = torch.arange(20000.0)
    assert rank_correlation(many, many.flip(0)) == -1
    assert rank_correlation(torch.ones(2, 1), torch.ones(1)).tolist() == [1, 1]


def test_equal_values_are_ranked_as_they_stand() -> None:
    assert rank_correlation(torch.zeros(5), torch.arange(5.0)) == 1


def test_steps_weigh_by_how_little_they_agree_with_the_weights() -> None:
    share = math.e / (math.e + 1 / math.e)  # of the step of rho = -1, beside one of rho = 1
    assert share == pytest.approx(0.8808, abs=1e-4)
    found = salience(BY_STEP, WEIGHTS)
    assert found.tolist() == pytest.approx([8.4040, 7.6424, 1.5960], abs=1e-4)
    assert torch.allclose(found, (1 - share) * BY_STEP[0] + share * BY_STEP[1])


def test_steps_that_agree_alike_weigh_alike() -> None:
    by_step = torch.tensor([[1.0, 2.0, 9.0], [3.0, 5.0, 6.0], [0.5, 0.6, 0.7]])
    for weights in (WEIGHTS, -WEIGHTS):
        assert torch.allclose(salience(by_step, weights), by_step.mean(0))
    assert torch.equal(salience(by_step[:1], WEIGHTS), by_step[0])


def test_channels_and_weights_reach_equally_far_afterwards() -> None:
    layer = nn.Linear(3, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, -0.5, 0.2, 0.1]).outer(WEIGHTS))
    made = Salience().change(site(BY_STEP, {"layer": layer}))
    assert made.shift is None
    assert made.scale is not None
    inputs = salience(BY_STEP, WEIGHTS) / made.scale
    weights = made.weight(layer.weight).abs().amax(0)
    # One factor for all channels is free: of the input it is taken, and given to the weight.
    assert torch.allclose(inputs / weights, (inputs / weights)[:1])
    assert torch.allclose(inputs * weights, salience(BY_STEP, WEIGHTS) * WEIGHTS)
    expected = (salience(BY_STEP, WEIGHTS) / WEIGHTS).sqrt()
    assert torch.allclose(made.scale / made.scale[0], expected / expected[0])


def test_layers_that_share_an_input_are_balanced_together() -> None:
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {name: nn.Linear(8, 4) for name in "qkv"}
    by_step = torch.rand(5, 8)
    stacked = nn.Linear(8, 12)
    with torch.no_grad():
        stacked.weight.copy_(torch.cat([layer.weight for layer in layers.values()]))
    together = Salience().change(site(by_step, layers))
    assert torch.equal(together.scale, Salience().change(site(by_step, {"qkv": stacked})).scale)


def test_a_model_of_one_step_is_smoothed_as_by_smoothquant() -> None:
    torch.manual_seed(0)
    one = site(torch.rand(1, 8), {"layer": nn.Linear(8, 4)})
    for alpha in (0.0, 0.3, 0.5, 1.0):
        found, expected = Salience(alpha=alpha).change(one), SmoothQuant(alpha=alpha).change(one)
        assert torch.allclose(found.scale, expected.scale)


@torch.no_grad()
@pytest.mark.parametrize("name", ["dit64", "sd32"])
def test_each_layer_computes_the_same_in_full_precision(name: str) -> None:
    model = MODELS[name].network(MODELS[name].build()).eval()
    steps = (PTQ("int4", "int8", "dynamic"), Salience())
    job = start(model, Recipe("t", steps), Samples(model), None)
    for step in steps:
        job.plan = step.decide(job)
    assert len(job.transforms) > 10
    for layer_name, transform in job.transforms.items():
        layer = model.get_submodule(layer_name)
        assert transform.spec == Transform(scale=torch.ones(1)).spec
        assert (transform.scale > 0).all()
        assert transform.scale.shape == largest_weights(layer).shape
        is_conv = isinstance(layer, nn.Conv2d)
        shape = (2, layer.in_channels, 8, 8) if is_conv else (16, layer.in_features)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        expected = layer(x)
        groups = layer.groups if is_conv else 1
        layer.weight.copy_(transform.weight(layer.weight, groups))
        assert relative_error(layer(transform.input(x, 1)), expected) < 1e-5


def test_roles_may_be_chosen() -> None:
    model = MODELS["dit64"].network(MODELS["dit64"].build())
    roles = family_of(model).roles(model)
    steps = (PTQ("int4", "int8", "dynamic"), Salience(roles=("self-attention",)))
    plan = quantize(model, Recipe("t", steps), Samples(model))
    changed = {
        name for name, layer in packed_layers(model).items() if layer.input_scale is not None
    }
    changed |= {name for name, spec in plan.layers.items() if spec.transform is not None}
    assert changed
    assert {roles[name] for name in changed} == {Role.SELF_ATTENTION}
