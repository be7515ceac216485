"""A layer while its weight learns to be of few bits, with every binarizer, and after."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dq.binarizers import binarizers
from dq.nn.simulated import QuantLinear, simulate
from dq.plan import LayerSpec
from dq.spec import Granularity, TensorSpec
from dq.tuning.binarized import Binarized

each = pytest.mark.parametrize("name", binarizers.names())


def begun(name: str, salient: int = 0) -> tuple[QuantLinear, Binarized]:
    torch.manual_seed(0)
    layer = nn.Linear(32, 8)
    weight = binarizers[name](layer.weight.detach()).spec
    dense = TensorSpec("int4", Granularity("channel")) if salient else None
    spec = LayerSpec(weight, salient=dense, salient_channels=salient)
    simulated = simulate(layer, spec)
    assert isinstance(simulated, QuantLinear)
    return simulated, Binarized(simulated, lambda matrix: binarizers[name](matrix))


@each
@pytest.mark.parametrize("salient", [0, 5])
def test_what_is_stored_computes_what_has_learned(name: str, salient: int) -> None:
    layer, learning = begun(name, salient)
    groups = learning.groups(rate=2.0, scale_rate=1.0)
    with torch.no_grad():
        for parameter in (p for group in groups for p in group.parameters):
            parameter.add_(0.1 * parameter.abs().mean() * torch.randn_like(parameter))
    learning.at(1.0)
    x = torch.randn(4, 32)
    expected = layer(x)
    learning.end()
    assert layer.binarizer is None
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@each
def test_weight_bias_and_scales_learn(name: str) -> None:
    layer, learning = begun(name)
    parameters = [p for g in learning.groups(1.0, 1.0) for p in g.parameters]
    assert layer.latent_bias in set(parameters)
    layer(torch.randn(4, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)


def test_codes_of_an_earlier_step_do_not_stand_in_the_way() -> None:
    layer, learning = begun("xnor")
    learning.end()
    assert layer.codes is not None
    again = Binarized(layer, lambda matrix: binarizers["xnor"](matrix))
    parameters = [p for g in again.groups(1.0, 1.0) for p in g.parameters]
    layer(torch.randn(4, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)


def test_rates_are_in_units_of_the_weight() -> None:
    layer, learning = begun("xnor")
    weights, scales = learning.groups(rate=2.0, scale_rate=3.0)
    size = float(layer.weight.detach().abs().mean())
    assert weights.rate == pytest.approx(2 * size)
    assert scales.rate == pytest.approx(3 * size)


def test_before_it_has_started_the_weight_is_that_of_full_precision() -> None:
    layer, learning = begun("xnor")
    x = torch.randn(4, 32)
    learning.at(0.0, started=False)
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), plain)
    learning.at(0.0)
    assert not torch.allclose(layer(x), plain, rtol=0.1)
