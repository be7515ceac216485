import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dq.blocks import float_blocks, outer_scale
from dq.formats import formats
from dq.quantize import choose_scales, quantize
from dq.spec import Granularity, TensorSpec

MX = ("e2m1", "e2m3", "e3m2", "e4m3", "e5m2")
MX_RULES = ("floor", "ceil", "even", "rceil")


def spec(format: str, scales: str, rule: str, dynamic: bool = False) -> TensorSpec:
    size = Granularity("group", 16 if scales == "e4m3" else 32)
    return TensorSpec(format, size, scale_format=scales, scale_rule=rule, dynamic=dynamic)


def matrix(spread: float = 12.0) -> torch.Tensor:
    """64 x 128, with blocks of very different size, an all-zero one, and exact powers of two."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 128, generator=generator)
    x *= torch.exp2(torch.randn(64, 4, generator=generator) * spread / 3).repeat_interleave(32, 1)
    x[3, 32:64] = 0
    x[4] = 2.0 ** torch.arange(-64, 64)
    return x


@given(st.sampled_from(MX), st.sampled_from(MX_RULES), st.floats(2.0**-60, 2.0**60, width=32))
def test_mx_exponents_are_those_of_their_definitions(format: str, rule: str, reach: float) -> None:
    grid = formats[format]
    emax = math.frexp(grid.high)[1] - 1
    exact = math.log2(reach)
    if rule == "even":  # half away from zero, at the mantissa of an element
        ulp = 2.0 ** (math.floor(exact) - grid.mantissa)
        exact = math.log2(math.floor(reach / ulp + 0.5) * ulp)
    expected = {
        "floor": math.floor(exact) - emax,
        "ceil": math.ceil(exact) - emax,
        "even": math.floor(exact) - emax,
        "rceil": math.ceil(math.log2(reach / grid.high)),
    }[rule]
    parts = torch.zeros(1, 1, 32)
    parts[0, 0, 5] = -reach
    found = float_blocks(parts, torch.ones(1, 1), spec(format, "e8m0", rule))
    assert found.item() == 2.0**expected


@pytest.mark.parametrize("format", MX)
def test_rceil_saturates_nothing_and_half_of_it_would(format: str) -> None:
    s, parts = spec(format, "e8m0", "rceil"), matrix().view(64, 4, 32)
    step = choose_scales(matrix(), s).step
    top = parts.abs().amax(-1) / step
    assert (top <= s.grid.high).all()
    assert (top[parts.any(-1)] > s.grid.high / 2).all()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("rule", ["nearest", "four-six", "search"])
def test_nvfp4_multipliers_are_e4m3_and_more_choice_is_less_error(rule: str, dynamic: bool) -> None:
    x = matrix(3.0)[5:]
    s = spec("e2m1", "e4m3", rule, dynamic)
    scale, _, multiplier, _ = choose_scales(x, s)
    assert torch.equal(formats["e4m3"].round(multiplier), multiplier)
    assert (multiplier > 0).all()
    assert scale.shape == ((59, 1) if dynamic else (1, 1))
    step = (scale * multiplier).unsqueeze(-1)
    parts = x.view(59, 8, 16)
    error = (s.grid.round(parts / step) * step - parts).square().sum(-1)
    reach = x.abs().amax(1, keepdim=True)
    room = outer_scale(reach, spec("e2m1", "e4m3", "four-six", dynamic))
    plain = formats["e4m3"].round(parts.abs().amax(-1) / 6 / room).clamp_min(2.0**-9)
    step = (room * plain).unsqueeze(-1)
    nearest = (s.grid.round(parts / step) * step - parts).square().sum(-1)
    if rule != "nearest":
        assert (error <= nearest).all()
        assert error.sum() < 0.95 * nearest.sum()


def test_the_scale_of_nvfp4_reaches_the_largest_magnitude() -> None:
    x = matrix(3.0)
    scales = choose_scales(x, spec("e2m1", "e4m3", "nearest"))
    assert scales.scale.item() == pytest.approx(x.abs().max().item() / (448 * 6))
    assert scales.multiplier.max() == 448


def test_rows_of_dynamic_inputs_do_not_depend_on_each_other() -> None:
    x = matrix(3.0)
    for s in (spec("e2m1", "e4m3", "nearest", True), spec("e4m3", "e8m0", "rceil", True)):
        whole, alone = choose_scales(x, s), choose_scales(x[7:8], s)
        assert torch.equal(whole.rows(slice(7, 8)).step, alone.step)


@pytest.mark.parametrize("rule", MX_RULES)
@pytest.mark.parametrize("format", ["e4m3", "e5m2", "e2m1", "e2m3", "e3m2"])
def test_mx_codes_are_those_of_torchao(format: str, rule: str) -> None:
    theirs = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", exc_type=ImportError)
    dtypes = {
        "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "e2m1": torch.float4_e2m1fn_x2,
        "e2m3": "fp6_e2m3", "e3m2": "fp6_e3m2",
    }  # fmt: skip
    x, s = matrix(), spec(format, "e8m0", rule)
    mode = theirs.ScaleCalculationMode(rule)
    scale, data = theirs.to_mx(x, dtypes[format], 32, mode)
    mine = choose_scales(x, s)
    expected = formats["e8m0"].encode(mine.multiplier)
    assert torch.equal(scale.view(torch.uint8).view(64, 4), expected)
    codes = quantize(x, mine, s)
    if format == "e2m1":
        data = data.view(torch.uint8)
        data = torch.stack([data & 15, data >> 4], -1).view(64, 128)
    assert torch.equal(data.view(torch.uint8).view(64, 128), codes)


@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_nvfp4_codes_are_those_of_torchao(spread: float) -> None:
    theirs = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor", exc_type=ImportError)
    x, s = matrix(spread), spec("e2m1", "e4m3", "nearest")
    x = x[torch.arange(64) != 4]  # its tiny blocks underflow, where libraries differ
    mine = choose_scales(x, s)
    scale, data = theirs.nvfp4_quantize(x.clone(), 16, mine.scale.view(()))
    live = (x.view(63, 8, 16).abs().amax(-1) > 0) & (mine.multiplier >= 2.0**-6)
    assert live.float().mean() > 0.9
    assert torch.equal(scale.view(63, 8).float()[live], mine.multiplier[live])
    data = torch.stack([data & 15, data >> 4], -1).view(63, 8, 16)
    codes = quantize(x, mine, s).view(63, 8, 16)
    # It multiplies by a reciprocal where the definition divides: ties may fall otherwise.
    assert (data[live] != codes[live]).float().mean() < 1e-3
