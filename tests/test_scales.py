import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dq.formats import IntFormat, formats
from dq.scales import Scales, scales_of_range
from dq.spec import Granularity, TensorSpec

TENSOR = Granularity("tensor")
ASYMMETRIC = [n for n, entry in formats.items() if isinstance(entry, IntFormat)]
values = st.floats(-1e6, 1e6, width=32)


def one(value: float) -> torch.Tensor:
    return torch.tensor([[value]])


# Ranges are those of tensors that may be inputs; signs are fitted by `dq.bases`.
RANGED = [n for n, grid in formats.items() if grid.low <= 0 and grid.bits > 1]


@given(st.sampled_from(RANGED), values, values)
def test_a_symmetric_range_ends_at_the_last_level(name: str, a: float, b: float) -> None:
    spec = TensorSpec(name, TENSOR)
    low, high = min(a, b), max(a, b)
    scales = scales_of_range(one(low), one(high), spec)
    assert scales.zero is None
    assert scales.multiplier is None
    reach = max(-low, high) if spec.grid.low < 0 else high
    if reach > 1e-30:
        assert float(scales.scale * spec.grid.high) == pytest.approx(reach, rel=1e-6)
    else:
        assert reach > 0 or float(scales.scale) == 1.0


@given(st.sampled_from(ASYMMETRIC), values, values)
def test_an_asymmetric_range_and_zero_lie_on_the_grid(name: str, a: float, b: float) -> None:
    spec = TensorSpec(name, TENSOR, symmetric=False)
    low, high = min(a, b), max(a, b)
    scale, zero, multiplier, _ = scales_of_range(one(low), one(high), spec)
    assert multiplier is None
    assert scale > 0
    assert zero == zero.round()
    assert spec.grid.low <= zero <= spec.grid.high
    if high - low < 1e-30:
        return
    # The ends are off by at most the half step to which the zero point is rounded.
    assert spec.grid.low - 0.501 <= low / scale + zero
    assert high / scale + zero <= spec.grid.high + 0.501


def test_a_range_beside_zero_is_widened_to_it() -> None:
    spec = TensorSpec("uint8", TENSOR, symmetric=False)
    scale, zero, *_ = scales_of_range(one(10.0), one(20.0), spec)
    assert (float(scale), float(zero)) == (pytest.approx(20 / 255), 0.0)
    scale, zero, *_ = scales_of_range(one(-20.0), one(-10.0), spec)
    assert (float(scale), float(zero)) == (pytest.approx(20 / 255), 255.0)


@pytest.mark.parametrize("value", [0.0, 1e-44])
@pytest.mark.parametrize("symmetric", [True, False])
def test_ranges_of_nothing_have_scale_one(value: float, symmetric: bool) -> None:
    spec = TensorSpec("int8", TENSOR, symmetric=symmetric)
    assert scales_of_range(one(-value), one(value), spec).scale == 1.0


def test_an_unsigned_grid_ignores_what_is_below_zero() -> None:
    spec = TensorSpec("uint8", TENSOR)
    assert scales_of_range(one(-100.0), one(2.55), spec).scale == pytest.approx(0.01)


def test_ranges_are_independent_of_each_other() -> None:
    spec = TensorSpec("int8", TENSOR, symmetric=False)
    low, high = -torch.rand(3, 4), torch.rand(3, 4)
    together = scales_of_range(low, high, spec)
    for index in range(12):
        alone = scales_of_range(low.flatten()[index], high.flatten()[index], spec)
        assert together.scale.flatten()[index] == alone.scale
        assert together.zero.flatten()[index] == alone.zero


def test_the_step_is_scale_times_multiplier() -> None:
    scale, multiplier = torch.tensor([[0.5], [2.0]]), torch.tensor([[1.0, 3.0], [2.0, 16.0]])
    assert torch.equal(Scales(scale).step, scale)
    expected = torch.tensor([[0.5, 1.5], [4.0, 32.0]])
    assert torch.equal(Scales(scale, None, multiplier).step, expected)
