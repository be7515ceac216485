"""Layers of which some input channels have weights of more bits."""

from __future__ import annotations

import pytest
import torch

from dq.distance import relative_error
from dq.errors import DQError
from dq.nn.packed import packed
from dq.nn.split import chosen_by_size, columns_of, joined
from dq.plan import LayerSpec
from dq.spec import Granularity, TensorSpec
from tests.nn.layers import build, calibrated

CHANNEL = Granularity("channel")
INT4 = TensorSpec("int4", CHANNEL, observer="mse")
RESTS = (
    TensorSpec("binary", CHANNEL),
    TensorSpec("binary", CHANNEL, symmetric=False, bases=2),
    TensorSpec("int2", CHANNEL, symmetric=False),
    TensorSpec("ternary", CHANNEL),
)
INPUTS = (None, TensorSpec("int8", Granularity("tensor"), symmetric=False))
each = pytest.mark.parametrize("name", ["linear", "linear without bias", "conv", "strided conv"])
rests = pytest.mark.parametrize("rest", RESTS, ids=str)


def split(rest: TensorSpec, low: TensorSpec | None = None, count: int = 3) -> LayerSpec:
    return LayerSpec(rest, low, salient=INT4, salient_channels=count)


@each
@rests
@pytest.mark.parametrize("low", INPUTS, ids=str)
def test_packed_layers_equal_the_simulated_ones(name: str, rest: TensorSpec, low) -> None:
    layer, x = build(name)
    spec = split(rest, low)
    simulated = calibrated(layer, x, spec)
    made = packed(layer, spec)
    made.load_layer(simulated)
    with torch.no_grad():
        assert torch.equal(made.float_weight(), simulated.rounded_weight())
        assert relative_error(made(x), simulated(x)) <= 1e-5
    bias = 0 if made.bias is None else 4 * made.bias.numel()
    assert made.stored_bytes() - bias == spec.bytes(made.rows, made.columns, made.channels)
    again = packed(layer, spec, torch.device("meta"))
    again.load_state_dict(made.state_dict(), strict=True, assign=True)
    with torch.no_grad():
        assert torch.equal(again(x), made(x))
    assert "emulated" in made.path("cpu")
    assert made.bfloat16().salient.dtype == torch.float32


@each
@rests
def test_more_channels_of_more_bits_are_nearer(name: str, rest: TensorSpec) -> None:
    layer, x = build(name)
    errors = []
    for count in (1, 3, 7):
        simulated = calibrated(layer, x, split(rest, None, count))
        errors.append(relative_error(simulated.rounded_weight().detach(), layer.weight.detach()))
    assert errors == sorted(errors, reverse=True)


def test_channels_may_be_chosen() -> None:
    layer, x = build("conv")
    simulated = calibrated(layer, x, split(RESTS[0]))
    channels = torch.tensor([0, 5, 6])
    simulated.set_salient(channels)
    error = (simulated.rounded_weight() - layer.weight).detach().square().sum((0, 2, 3))
    assert set(error.topk(3, largest=False).indices.tolist()) == set(channels.tolist())
    made = packed(layer, simulated.spec)
    made.load_layer(simulated)
    assert made.salient.tolist() == channels.tolist()


def test_columns_of_channels_follow_each_other() -> None:
    mask = columns_of(torch.tensor([0.0, 2.0]), 3, 12)
    assert mask.tolist() == [True] * 4 + [False] * 4 + [True] * 4
    matrix = torch.randn(5, 12)
    assert torch.equal(joined(matrix[:, ~mask], matrix[:, mask], mask), matrix)
    matrix[:, 4:8] = 9
    assert chosen_by_size(matrix, 3, 1).tolist() == [1.0]


def test_grouped_convolutions_have_none() -> None:
    layer, x = build("grouped conv")
    with pytest.raises(DQError, match="groups of a convolution"):
        calibrated(layer, x, split(RESTS[0]))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"salient": INT4}, "0 salient channels"),
        ({"salient_channels": 3}, "3 salient channels of None"),
        (
            {"salient": TensorSpec("int4", Granularity("group", 8)), "salient_channels": 1},
            "have a scale an output channel",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(settings, text: str) -> None:
    with pytest.raises(DQError, match=text):
        LayerSpec(RESTS[0], **settings)


def test_specs_survive_json() -> None:
    spec = split(RESTS[1])
    assert LayerSpec.from_dict(spec.to_dict()) == spec
    assert "with 3 of int4 channel" in str(spec)
