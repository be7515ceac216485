"""What holds of every way to round weights by the inputs of their layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from dq.errors import DQError
from dq.quantize import dequantize, quantize
from dq.rounding.gptq import gptq
from dq.rounding.learned import learned_rounding
from dq.rounding.signed import signed_rounding
from dq.scales import Scales
from dq.spec import TensorSpec
from tests.rounding.cases import COLUMNS, NARROW, gain, inputs, moment_of, narrow, scaled, weight

Round = Callable[[Tensor, Scales, TensorSpec, Tensor], Tensor]

WHOLE: dict[str, Round] = {
    "gptq": gptq,
    "adaround": learned_rounding,
    "signround": signed_rounding,
}
SHORT: dict[str, Round] = {
    "gptq": gptq,
    "adaround": partial(learned_rounding, steps=200),
    "signround": partial(signed_rounding, steps=100),
}
GAINS = {"gptq": 7.0, "adaround": 5.0, "signround": 4.0}  # dB at 3 and 4 bits

SPEC = NARROW["int4-g32"]
FEW = {name: NARROW[name] for name in ("int4-g32", "e2m1", "nvfp4", "mxfp4", "uint4")}

every = pytest.mark.parametrize("name", [*SHORT])
few = pytest.mark.parametrize("spec", FEW.values(), ids=[*FEW])


def changed(codes: Tensor, others: Tensor, scales: Scales, spec: TensorSpec) -> float:
    """Return the share of weights whose level is another; 0 and -0 are one."""
    found, wanted = (dequantize(c, scales, spec) for c in (codes, others))
    return float((found != wanted).float().mean())


@every
@narrow
def test_it_beats_the_nearest_levels_on_inputs_that_it_has_not_seen(
    name: str, spec: TensorSpec
) -> None:
    w, scales = scaled(spec)
    codes = WHOLE[name](w, scales, spec, moment_of(inputs()))
    assert gain(codes, quantize(w, scales, spec), w, scales, spec) > GAINS[name]


@every
@few
def test_weights_on_a_level_stay_there(name: str, spec: TensorSpec) -> None:
    w, scales = scaled(spec)
    exact = dequantize(quantize(w, scales, spec), scales, spec)
    codes = SHORT[name](exact, scales, spec, moment_of(inputs()))
    assert torch.allclose(dequantize(codes, scales, spec), exact, rtol=1e-6, atol=0)


@every
@few
@pytest.mark.parametrize("kind", ["identity", "diagonal", "zero"])
def test_inputs_that_do_not_depend_on_each_other_leave_the_nearest(
    name: str, spec: TensorSpec, kind: str
) -> None:
    w, scales = scaled(spec)
    diagonal = {
        "identity": torch.ones(COLUMNS),
        "diagonal": torch.linspace(3.0, 0.0, COLUMNS),
        "zero": torch.zeros(COLUMNS),
    }[kind]
    codes = SHORT[name](w, scales, spec, torch.diag(diagonal))
    assert changed(codes, quantize(w, scales, spec), scales, spec) < 1e-3  # near ties


@every
@few
def test_channels_that_are_always_zero_keep_their_nearest_levels(
    name: str, spec: TensorSpec
) -> None:
    w, scales = scaled(spec)
    x = inputs().clone()
    x[:, 30:70] = 0
    codes, nearest = SHORT[name](w, scales, spec, moment_of(x)), quantize(w, scales, spec)
    found, wanted = (dequantize(c, scales, spec) for c in (codes, nearest))
    assert (found[:, 30:70] != wanted[:, 30:70]).float().mean() < 1e-3
    assert gain(codes, nearest, w, scales, spec) > 1


@every
@few
def test_rows_do_not_depend_on_each_other_nor_on_a_unit(name: str, spec: TensorSpec) -> None:
    w, scales = scaled(spec)
    moment = moment_of(inputs())
    expected = SHORT[name](w, scales, spec, moment)
    loud = torch.where(torch.arange(len(w)) % 2 == 0, 64.0, 1.0).unsqueeze(1)
    if spec.scale_format == "e4m3":  # one number for the whole tensor: that of its rows is left
        louder = scales._replace(scale=scales.scale * loud)
    else:
        louder = scaled(spec, w * loud)[1]
        assert torch.equal(louder.step[1::2], scales.step[1::2])
    codes = SHORT[name](w * loud, louder, spec, moment)
    assert (codes[1::2] != expected[1::2]).float().mean() < 1e-3
    assert (codes[::2] != expected[::2]).float().mean() < 1e-3


@every
@pytest.mark.parametrize("unit", [1e-30, 2.0**-30, 1e-8, 1e8, 2.0**30, 1e30])
def test_the_unit_of_the_inputs_changes_nothing(name: str, unit: float) -> None:
    w, scales = scaled(SPEC)
    moment = moment_of(inputs())
    expected = SHORT[name](w, scales, SPEC, moment)
    codes = SHORT[name](w, scales, SPEC, moment * unit)
    assert (codes != expected).float().mean() < 0.01


@every
@pytest.mark.parametrize("unit", [1e-37, 1e-38, 1e-39, 1e-40, 1e-42, 1e-45])
def test_moments_as_good_as_zero_are_no_error(name: str, unit: float) -> None:
    w, scales = scaled(SPEC)
    codes = SHORT[name](w, scales, SPEC, moment_of(inputs()) * unit)
    assert gain(codes, quantize(w, scales, SPEC), w, scales, SPEC) >= -0.1


@every
@pytest.mark.parametrize("rows", [1, 4, 8, 20])
def test_few_inputs_are_fitted_and_others_suffer_little(name: str, rows: int) -> None:
    w, scales = scaled(SPEC)
    x = inputs()[:rows]
    codes, nearest = WHOLE[name](w, scales, SPEC, moment_of(x)), quantize(w, scales, SPEC)
    errors = [(x @ (dequantize(c, scales, SPEC) - w).T).square().sum() for c in (codes, nearest)]
    assert errors[0] < (0.05 if name == "gptq" else 0.3) * errors[1]
    assert gain(codes, nearest, w, scales, SPEC) > -1.5


@every
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_moments_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    w, scales = scaled(SPEC)
    moment = moment_of(inputs())
    moment[3, 4] = bad
    with pytest.raises(DQError, match="moment of its inputs is not finite; calibrate in float32"):
        SHORT[name](w, scales, SPEC, moment)


@every
def test_gradients_are_neither_needed_nor_left_behind(name: str) -> None:
    w, scales = scaled(SPEC)
    moment = moment_of(inputs())
    expected = SHORT[name](w, scales, SPEC, moment)
    with torch.no_grad():
        assert torch.equal(SHORT[name](w, scales, SPEC, moment), expected)
    w = weight().requires_grad_()
    assert torch.equal(SHORT[name](w, scales, SPEC, moment), expected)
    assert w.grad is None


@every
def test_weights_of_other_dtypes_are_rounded_in_float32(name: str) -> None:
    w = weight().bfloat16()
    scales, moment = scaled(SPEC, w)[1], moment_of(inputs())
    expected = SHORT[name](w.float(), scales, SPEC, moment)
    assert torch.equal(SHORT[name](w, scales, SPEC, moment), expected)


@every
@pytest.mark.parametrize("spec", [SPEC, NARROW["uint4"]], ids=["int4-g32", "uint4"])
def test_the_arguments_are_left_alone(name: str, spec: TensorSpec) -> None:
    w, scales = scaled(spec)
    moment = moment_of(inputs())
    before = [None if x is None else x.clone() for x in scales]
    SHORT[name](w, scales, spec, moment)
    assert torch.equal(w, weight())
    assert torch.equal(moment, moment_of(inputs()))
    for x, y in zip(scales, before, strict=True):
        assert x is None or torch.equal(x, y)
