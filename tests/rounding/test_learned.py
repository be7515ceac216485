import pytest
import torch

from dq.errors import DQError
from dq.quantize import dequantize, quantize
from dq.rounding.grid import spread
from dq.rounding.learned import learned_rounding
from dq.scales import Scales
from dq.spec import TensorSpec
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
    codes = learned_rounding(w, scales, spec, moment_of(inputs()))
    assert gain(codes, quantize(w, scales, spec), w, scales, spec) > 5


@each
def test_weights_become_a_level_next_to_them(spec: TensorSpec) -> None:
    w, scales = scaled(spec)
    codes = learned_rounding(w, scales, spec, moment_of(inputs()), steps=20, rate=0.3)
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
    nearest = quantize(w, scales, spec)
    assert 0 < (codes != nearest).float().mean() < 0.5


@each
def test_it_starts_from_the_nearest_levels(spec: TensorSpec) -> None:
    w, scales = scaled(spec)
    codes = learned_rounding(w, scales, spec, moment_of(inputs()), steps=0)
    step, _ = spread(scales, *w.shape)
    found, wanted = (dequantize(c, scales, spec) for c in (codes, quantize(w, scales, spec)))
    # Equal but for ties, and for 0 and -0.
    assert ((found - w).abs() - (wanted - w).abs() <= 1e-5 * step).all()
    assert (found != wanted).float().mean() < 1e-3


@few
def test_weights_on_a_level_stay_there(spec: TensorSpec) -> None:
    w, scales = scaled(spec)
    exact = dequantize(quantize(w, scales, spec), scales, spec)
    codes = learned_rounding(exact, scales, spec, moment_of(inputs()), steps=50)
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
    codes = learned_rounding(w, scales, spec, torch.diag(diagonal), steps=100)
    found, wanted = (dequantize(c, scales, spec) for c in (codes, quantize(w, scales, spec)))
    assert (found != wanted).float().mean() < 1e-3  # near ties


@few
def test_channels_that_are_always_zero_keep_their_nearest_levels(spec: TensorSpec) -> None:
    w, scales = scaled(spec)
    x = inputs().clone()
    x[:, 30:70] = 0
    codes = learned_rounding(w, scales, spec, moment_of(x), steps=200)
    found, wanted = (dequantize(c, scales, spec) for c in (codes, quantize(w, scales, spec)))
    assert (found[:, 30:70] != wanted[:, 30:70]).float().mean() < 1e-3
    assert gain(codes, quantize(w, scales, spec), w, scales, spec) > 1


@few
def test_rows_do_not_depend_on_each_other(spec: TensorSpec) -> None:
    w, scales = scaled(spec)
    moment = moment_of(inputs())
    expected = learned_rounding(w, scales, spec, moment, steps=100)
    loud = torch.where(torch.arange(len(w)) % 2 == 0, 64.0, 1.0).unsqueeze(1)
    if spec.scale_format == "e4m3":  # one number for the whole tensor: that of its rows is left
        louder = scales._replace(scale=scales.scale * loud)
    else:
        louder = scaled(spec, w * loud)[1]
        assert torch.equal(louder.step[1::2], scales.step[1::2])
    codes = learned_rounding(w * loud, louder, spec, moment, steps=100)
    assert (codes[1::2] != expected[1::2]).float().mean() < 1e-3
    assert (codes[::2] != expected[::2]).float().mean() < 1e-3  # a unit of the weight is none


@pytest.mark.parametrize("unit", [1e-30, 1e-12, 1e-8, 1e8, 1e30])
def test_the_unit_of_the_inputs_changes_nothing(unit: float) -> None:
    spec = NARROW["int4-g32"]
    w, scales = scaled(spec)
    moment = moment_of(inputs())
    expected = learned_rounding(w, scales, spec, moment, steps=200)
    codes = learned_rounding(w, scales, spec, moment * unit, steps=200)
    assert (codes != expected).float().mean() < 0.01
    nearest = quantize(w, scales, spec)
    assert gain(codes, nearest, w, scales, spec) > 5


@pytest.mark.parametrize("unit", [1e-38, 1e-40, 1e-45])
def test_moments_as_good_as_zero_are_no_error(unit: float) -> None:
    spec = NARROW["int4-g32"]
    w, scales = scaled(spec)
    codes = learned_rounding(w, scales, spec, moment_of(inputs()) * unit, steps=20)
    assert gain(codes, quantize(w, scales, spec), w, scales, spec) >= -0.1


def test_it_learns_where_gradients_are_off_and_leaves_none_behind() -> None:
    spec = NARROW["int4-g32"]
    w, scales = scaled(spec)
    moment = moment_of(inputs())
    expected = learned_rounding(w, scales, spec, moment, steps=20)
    with torch.no_grad():
        assert torch.equal(learned_rounding(w, scales, spec, moment, steps=20), expected)
    w = weight().requires_grad_()
    assert torch.equal(learned_rounding(w, scales, spec, moment, steps=20), expected)
    assert w.grad is None


def test_few_inputs_are_fitted() -> None:
    spec = NARROW["int4-g32"]
    w, scales = scaled(spec)
    x = inputs()[:8]
    codes = learned_rounding(w, scales, spec, moment_of(x))
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
        learned_rounding(w, scales, spec, moment, steps=2)


def test_the_weight_is_left_alone() -> None:
    spec = NARROW["uint4"]
    w, scales = scaled(spec)
    before = Scales(*(None if x is None else x.clone() for x in scales))  # type: ignore[arg-type]
    learned_rounding(w, scales, spec, moment_of(inputs()), steps=3)
    assert torch.equal(w, weight())
    for x, y in zip(scales, before, strict=True):
        assert x is None or torch.equal(x, y)
