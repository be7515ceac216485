"""Scales, tables and corrections that depend on the timestep."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dq.nn.packed import packed
from dq.nn.simulated import simulate
from dq.nn.steps import noted
from dq.nn.stepwise import by_group, spread_rows
from dq.plan import LayerSpec
from dq.spec import Granularity, TensorSpec
from tests.nn.layers import build

INT8 = TensorSpec("int8", Granularity("channel"))
CENTRES = (100.0, 500.0, 900.0)
INPUTS = {
    "tensor": TensorSpec("int8", Granularity("tensor"), symmetric=False, step_groups=CENTRES),
    "groups": TensorSpec("int8", Granularity("group", 8), step_groups=CENTRES),
    "float": TensorSpec("e4m3", Granularity("tensor"), step_groups=CENTRES),
}
NAMES = ["linear", "conv", "grouped conv"]


class Around(nn.Module):
    """A denoiser of one layer."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        return self.layer(sample)


def told(layer: Any, x: Tensor, now: Any) -> Tensor:
    """Call a layer through a denoiser."""
    model = Around(layer)
    with torch.no_grad(), noted(model) as steps:
        for module in model.modules():
            if hasattr(module, "depends_on_step"):
                module.steps = steps
        return model(x, now)


def rows(x: Tensor) -> int:
    return len(x)


def ranged(name: str, spec: TensorSpec) -> tuple[Any, Any, Tensor]:
    """A layer, simulated and packed, whose input has a wider range at later groups."""
    layer, x = build(name)
    simulated = simulate(layer, LayerSpec(INT8, spec))
    parts = x.shape[simulated.axis] // spec.granularity.size if spec.granularity.size else 1
    reach = torch.tensor([[1.0], [2.0], [4.0]]) * (1 + torch.arange(parts) / 4)
    simulated.set_input(-reach * 0.5, reach)
    made = packed(layer, simulated.spec)
    made.load_layer(simulated)
    return simulated, made, x


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", INPUTS)
@torch.no_grad()
def test_a_call_has_the_scales_of_its_group(name: str, kind: str) -> None:
    simulated, made, x = ranged(name, INPUTS[kind])
    spec = TensorSpec.from_dict({**INPUTS[kind].to_dict(), "step_groups": []})
    found = []
    for group, now in enumerate((0, 480, 1200)):
        alone = simulate(build(name)[0], LayerSpec(INT8, spec))
        quantizer = simulated.input_quantizers[0]
        scale, zero, *_ = quantizer.scales
        part = slice(group, group + 1)
        mine = quantizer.scales._replace(
            scale=scale[part], zero=None if zero is None else zero[part]
        )
        alone.input_quantizers[0].set_scales(mine)
        expected = alone(x)
        assert torch.equal(told(simulated, x, now), expected)
        assert torch.allclose(told(made, x, now), expected, atol=1e-4)
        found.append(expected)
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", INPUTS)
def test_rows_at_different_timesteps_are_rounded_apart(name: str, kind: str) -> None:
    simulated, made, x = ranged(name, INPUTS[kind])
    times = torch.tensor([900.0, 90.0, 460.0])[: rows(x)]
    for layer in (simulated, made):
        together = told(layer, x, times)
        for row, now in enumerate(times):
            alone = told(layer, x[row : row + 1], now)
            assert torch.allclose(together[row : row + 1], alone, atol=1e-5)


def test_what_is_stored_is_what_the_spec_counts() -> None:
    for kind, spec in INPUTS.items():
        _, made, _ = ranged("linear", spec)
        parts = 3 if kind == "groups" else 1
        assert made.input_affine.shape == (3, parts, 2)
        layer_spec = LayerSpec(INT8, spec)
        without = LayerSpec(INT8)
        assert layer_spec.bytes(10, 24, 24) - without.bytes(10, 24, 24) == 4 * 3 * parts * 2


@pytest.mark.parametrize("quantized", [False, True])
def test_a_table_answers_at_its_timesteps_only(quantized: bool) -> None:
    layer, x = nn.Linear(24, 10), torch.randn(3, 24)
    spec = LayerSpec(
        INT8, TensorSpec("int8", Granularity("token"), dynamic=True), tabled=(5.0, 7.0)
    )
    simulated = simulate(layer, spec)
    simulated.table = torch.randn(2, 10)
    made: Any = simulated
    if quantized:
        made = packed(layer, spec)
        made.load_layer(simulated)
    computed = made.product(x)
    assert torch.equal(told(made, x, 7), simulated.table[1].expand(3, -1))
    assert torch.equal(told(made, x, 6), computed)
    mixed = told(made, x, torch.tensor([5.0, 6.0, 7.0]))
    assert torch.equal(mixed, torch.stack([simulated.table[0], computed[1], simulated.table[1]]))
    assert "stored for 2 timesteps" in packed_path(made)


def packed_path(layer: Any) -> str:
    return layer.path() if hasattr(layer, "path") else "stored for 2 timesteps"


@pytest.mark.parametrize("name", NAMES)
def test_an_output_is_scaled_and_shifted_channel_by_channel(name: str) -> None:
    layer, x = build(name)
    spec = LayerSpec(INT8, output_groups=CENTRES)
    simulated = simulate(layer, spec)
    count = len(layer.weight)
    affine = torch.stack([torch.rand(3, count) + 0.5, torch.randn(3, count)], 1)
    simulated.output_affine = affine
    made = packed(layer, spec)
    made.load_layer(simulated)
    for each in (simulated, made):
        plain = each.product(x).detach()
        shape = (1, -1, 1, 1) if x.dim() == 4 else (-1,)
        for group, now in enumerate(CENTRES):
            expected = plain * affine[group, 0].view(shape) + affine[group, 1].view(shape)
            assert torch.allclose(told(each, x, now + 3), expected, atol=1e-6)
        mixed = told(each, x, torch.tensor(CENTRES[: len(x)]))
        for row in range(len(x)):
            gain, shift = affine[row]
            expected = plain[row] * gain.view(shape[1:] or -1) + shift.view(shape[1:] or -1)
            assert torch.allclose(mixed[row], expected, atol=1e-6)


def test_rows_are_put_back_in_their_order() -> None:
    x = torch.arange(6.0).view(6, 1)
    index = torch.tensor([2, 0, 1, 0, 2, 1])
    y = by_group(x, index, 3, lambda part, group: part * 10 + group)
    assert y.flatten().tolist() == [2, 10, 21, 30, 42, 51]
    assert spread_rows(torch.tensor([4, 5]), 6).tolist() == [4, 4, 4, 5, 5, 5]
    assert spread_rows(torch.tensor([4]), 3).tolist() == [4, 4, 4]


def test_scales_of_groups_learn_by_the_rows_that_use_them() -> None:
    simulated, _, x = ranged("linear", INPUTS["tensor"])
    gain = simulated.input_quantizers[0].learn()
    model = Around(simulated)
    with noted(model) as steps:
        simulated.steps = simulated.input_quantizers[0].steps = steps
        model(x, 500).square().sum().backward()
    assert gain.grad is not None
    assert gain.grad[1].abs() > 0
    assert gain.grad[0] == gain.grad[2] == 0


def test_a_gradient_is_of_the_step_of_its_own_call() -> None:
    """Another call may come before the backward pass, as where a loss is of two of them."""
    _, made, x = ranged("linear", INPUTS["tensor"])
    model = Around(made).requires_grad_(False)
    found = []
    with noted(model) as steps:
        made.steps = steps
        for between in (False, True):
            leaf = (4 * x).requires_grad_()
            loss = model(leaf, 100.0).square().sum()
            if between:
                model(x, 900.0)
            loss.backward()
            found.append(leaf.grad)
    assert torch.equal(*found)
    assert (found[0] == 0).any()  # what the narrow range of that step clips
