import itertools

import pytest
import torch
from torch import Tensor

from dq.errors import DQError
from dq.quantize import dequantize, quantize
from dq.rounding.error import output_error
from dq.rounding.grid import spread
from dq.rounding.signed import signed_rounding
from dq.scales import Scales
from dq.spec import Granularity, TensorSpec
from tests.rounding.cases import (
    COLUMNS,
    NARROW,
    each,
    gain,
    inputs,
    moment_of,
    narrow,
    scaled,
    weight,
)

FEW = {name: NARROW[name] for name in ("int4-g32", "e2m1", "nvfp4", "mxfp4", "uint4")}

few = pytest.mark.parametrize("spec", FEW.values(), ids=[*FEW])


@narrow
def test_it_beats_the_nearest_levels_on_inputs_that_it_has_not_seen(spec: TensorSpec) -> None:
    w, scales = scaled(spec)
    codes = signed_rounding(w, scales, spec, moment_of(inputs()))
    assert gain(codes, quantize(w, scales, spec), w, scales, spec) > 4


@each
@pytest.mark.parametrize(("rate", "most"), [(0.0, 0.7), (0.3, 1.0)])
def test_no_row_is_worse_than_the_nearest_levels(
    spec: TensorSpec, rate: float, most: float
) -> None:
    w, scales = scaled(spec)
    moment = moment_of(inputs())
    codes = signed_rounding(w, scales, spec, moment, steps=50, rate=rate)
    error, before = (
        output_error(c, w, scales, spec, moment) for c in (codes, quantize(w, scales, spec))
    )
    assert (error <= before * (1 + 1e-5)).all()
    assert error.sum() < most * before.sum()


@each
def test_weights_become_a_level_next_to_them(spec: TensorSpec) -> None:
    w, scales = scaled(spec)
    codes = signed_rounding(w, scales, spec, moment_of(inputs()), steps=20)
    assert codes.dtype == torch.uint8
    assert codes.shape == w.shape
    step, zero = spread(scales, *w.shape)
    place = w / step + (0.0 if zero is None else zero)
    levels = spec.grid.levels
    found = spec.grid.decode(codes)
    assert torch.isin(found, levels).all()
    # No other level lies between a weight and its own, which is the last one beyond the grid.
    low, high = torch.minimum(place, found), torch.maximum(place, found)
    between = (levels > low[..., None] + 1e-5) & (levels < high[..., None] - 1e-5)
    assert not between.any()
    assert 0 < (codes != quantize(w, scales, spec)).float().mean() < 0.5


@each
def test_without_steps_the_levels_are_the_nearest(spec: TensorSpec) -> None:
    w, scales = scaled(spec)
    codes = signed_rounding(w, scales, spec, moment_of(inputs()), steps=0)
    assert torch.equal(codes, quantize(w, scales, spec))


@few
def test_weights_on_a_level_stay_there(spec: TensorSpec) -> None:
    w, scales = scaled(spec)
    exact = dequantize(quantize(w, scales, spec), scales, spec)
    codes = signed_rounding(exact, scales, spec, moment_of(inputs()))
    assert torch.allclose(dequantize(codes, scales, spec), exact, rtol=1e-6, atol=0)


@few
@pytest.mark.parametrize("kind", ["identity", "diagonal", "zero"])
def test_inputs_that_do_not_depend_on_each_other_leave_the_nearest(
    spec: TensorSpec, kind: str
) -> None:
    w, scales = scaled(spec)
    diagonal = {
        "identity": torch.ones(COLUMNS),
        "diagonal": torch.linspace(3.0, 0.0, COLUMNS),
        "zero": torch.zeros(COLUMNS),
    }[kind]
    codes = signed_rounding(w, scales, spec, torch.diag(diagonal), steps=100)
    assert torch.equal(codes, quantize(w, scales, spec))


@few
def test_channels_that_are_always_zero_keep_their_nearest_levels(spec: TensorSpec) -> None:
    w, scales = scaled(spec)
    x = inputs().clone()
    x[:, 30:70] = 0
    codes = signed_rounding(w, scales, spec, moment_of(x))
    found, wanted = (dequantize(c, scales, spec) for c in (codes, quantize(w, scales, spec)))
    assert (found[:, 30:70] != wanted[:, 30:70]).float().mean() < 1e-3
    assert gain(codes, quantize(w, scales, spec), w, scales, spec) > 1


@few
def test_rows_do_not_depend_on_each_other(spec: TensorSpec) -> None:
    w, scales = scaled(spec)
    moment = moment_of(inputs())
    expected = signed_rounding(w, scales, spec, moment, steps=100)
    loud = torch.where(torch.arange(len(w)) % 2 == 0, 64.0, 1.0).unsqueeze(1)
    if spec.scale_format == "e4m3":  # one number for the whole tensor: that of its rows is left
        louder = scales._replace(scale=scales.scale * loud)
    else:
        louder = scaled(spec, w * loud)[1]
        assert torch.equal(louder.step[1::2], scales.step[1::2])
    codes = signed_rounding(w * loud, louder, spec, moment, steps=100)
    assert (codes[1::2] != expected[1::2]).float().mean() < 1e-3
    assert (codes[::2] != expected[::2]).float().mean() < 1e-3  # a unit of the weight is none


@pytest.mark.parametrize("unit", [2.0**-100, 2.0**-30, 2.0**30, 2.0**100])
def test_the_unit_of_the_inputs_changes_nothing(unit: float) -> None:
    spec = NARROW["int4-g32"]
    w, scales = scaled(spec)
    moment = moment_of(inputs())
    expected = signed_rounding(w, scales, spec, moment)
    assert torch.equal(signed_rounding(w, scales, spec, moment * unit), expected)


@pytest.mark.parametrize("unit", [1e-38, 1e-40, 1e-45])
def test_moments_as_good_as_zero_are_no_error(unit: float) -> None:
    spec = NARROW["int4-g32"]
    w, scales = scaled(spec)
    codes = signed_rounding(w, scales, spec, moment_of(inputs()) * unit, steps=20)
    assert gain(codes, quantize(w, scales, spec), w, scales, spec) >= -0.1


CHANNEL = TensorSpec("int4", Granularity("channel"))
UNIT = Scales(torch.ones(1, 1))  # levels are the integers from -7 to 7


def test_the_error_of_one_weight_makes_up_for_that_of_its_neighbour() -> None:
    """The nearest levels are both 0, with a loss of 0.694; (1, 0) has 0.066, (0, 1) has 0.058."""
    w = torch.tensor([[0.4, 0.45]])
    moment = torch.tensor([[1.0, 0.92], [0.92, 1.0]])
    codes = signed_rounding(w, UNIT, CHANNEL, moment)
    assert dequantize(codes, UNIT, CHANNEL).tolist() == [[0.0, 1.0]]


def test_few_weights_come_to_the_best_of_all_roundings_or_near_it() -> None:
    """Of each row all 2^8 roundings are tried."""
    columns = 8
    generator = torch.Generator().manual_seed(3)
    w = torch.rand(64, columns, generator=generator) * 8 - 4
    mixture = torch.eye(columns) + 0.5 * torch.rand(columns, columns, generator=generator)
    moment = mixture @ mixture.T
    scales = Scales(torch.ones(len(w), 1))

    def loss(levels: Tensor) -> Tensor:
        error = levels - w
        return ((error @ moment) * error).sum(1)

    ways = itertools.product((0.0, 1.0), repeat=columns)
    least = torch.stack([loss(w.floor() + torch.tensor(way)) for way in ways]).amin(0)
    nearest = loss(w.round())
    found = loss(dequantize(signed_rounding(w, scales, CHANNEL, moment), scales, CHANNEL))
    assert (found >= least * (1 - 1e-5)).all()
    assert (found <= nearest * (1 + 1e-5)).all()
    assert (found <= least * (1 + 1e-5)).float().mean() > 0.5
    assert (found - least).sum() < 0.2 * (nearest - least).sum()


def test_gradients_are_neither_needed_nor_left_behind() -> None:
    spec = NARROW["int4-g32"]
    w, scales = scaled(spec)
    moment = moment_of(inputs())
    expected = signed_rounding(w, scales, spec, moment, steps=20)
    with torch.no_grad():
        assert torch.equal(signed_rounding(w, scales, spec, moment, steps=20), expected)
    w = weight().requires_grad_()
    assert torch.equal(signed_rounding(w, scales, spec, moment, steps=20), expected)
    assert w.grad is None


def test_few_inputs_are_fitted() -> None:
    spec = NARROW["int4-g32"]
    w, scales = scaled(spec)
    x = inputs()[:8]
    codes = signed_rounding(w, scales, spec, moment_of(x))
    errors = [
        (x @ (dequantize(c, scales, spec) - w).T).square().sum()
        for c in (codes, quantize(w, scales, spec))
    ]
    assert errors[0] < 0.3 * errors[1]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_moments_that_are_not_finite_are_refused(bad: float) -> None:
    spec = NARROW["int4-g32"]
    w, scales = scaled(spec)
    moment = moment_of(inputs())
    moment[3, 4] = bad
    with pytest.raises(DQError, match="moment of its inputs is not finite; calibrate in float32"):
        signed_rounding(w, scales, spec, moment, steps=2)


def test_the_arguments_are_left_alone() -> None:
    spec = NARROW["uint4"]
    w, scales = scaled(spec)
    moment = moment_of(inputs())
    before = Scales(*(None if x is None else x.clone() for x in scales))  # type: ignore[arg-type]
    signed_rounding(w, scales, spec, moment, steps=3)
    assert torch.equal(w, weight())
    assert torch.equal(moment, moment_of(inputs()))
    for x, y in zip(scales, before, strict=True):
        assert x is None or torch.equal(x, y)
