"""Blocks are those of `dq.quantize` and of torchao, bit for bit."""

import itertools

import pytest
import torch
from torch import Tensor

from dq.errors import DQError
from dq.formats import formats
from dq.kernels.block_scales import decoded, in_blocks, pairs, swizzled
from dq.quantize import choose_scales, dequantize, quantize
from dq.spec import Granularity, TensorSpec

ELEMENTS = ("e2m1", "e2m3", "e3m2", "e4m3")
MX_RULES = ("floor", "ceil", "even", "rceil", "search")
NVFP4_RULES = ("nearest", "four-six", "search")


def matrix(columns: int = 256, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows from tiny to huge, with blocks of zeros, powers of two, and blocks far apart."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, columns, generator=generator)
    x *= torch.exp(torch.randn(37, columns // 16, generator=generator) * 2).repeat_interleave(16, 1)
    x[:3] *= torch.tensor([[1e-30], [1e-8], [1e20]])
    x[3] = 0
    x[4, :64] = 0
    x[5] = torch.ldexp(torch.ones(columns), torch.randint(-9, 9, (columns,), generator=generator))
    x[6, ::16] = 6 * 448
    return x.to(dtype)


def spec(name: str, rule: str, scales: str) -> TensorSpec:
    size = Granularity("group", 16 if scales == "e4m3" else 32)
    return TensorSpec(name, size, dynamic=True, scale_format=scales, scale_rule=rule)


def equals(x: Tensor, s: TensorSpec) -> bool:
    blocks = in_blocks(x, s)
    scales = choose_scales(x, s)
    codes = quantize(x, scales, s)
    assert s.scale_grid is not None
    written = s.scale_grid.encode(scales.multiplier)
    assert blocks.codes.is_contiguous()
    return (
        torch.equal(blocks.codes, codes)
        and torch.equal(blocks.scales, written)
        and torch.equal(blocks.outer, scales.scale)
        and torch.equal(decoded(blocks, s), dequantize(codes, scales, s))
    )


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@dtypes
@pytest.mark.parametrize("rule", NVFP4_RULES)
def test_nvfp4_inputs_are_quantized_as_everywhere(rule: str, dtype: torch.dtype) -> None:
    x = matrix(dtype=dtype)
    assert equals(x, spec("e2m1", rule, "e4m3"))


@dtypes
@pytest.mark.parametrize("rule", MX_RULES)
@pytest.mark.parametrize("name", ELEMENTS)
def test_mx_inputs_are_quantized_as_everywhere(name: str, rule: str, dtype: torch.dtype) -> None:
    x = matrix(dtype=dtype)
    assert equals(x, spec(name, rule, "e8m0"))


def test_every_rule_that_a_spec_may_have_is_known() -> None:
    for scales, known in (("e4m3", NVFP4_RULES), ("e8m0", MX_RULES)):
        for rule in {*MX_RULES, *NVFP4_RULES} - set(known):
            with pytest.raises(DQError, match="scale_rule"):
                spec("e2m1", rule, scales)


def test_scales_at_both_ends_of_the_exponents() -> None:
    x = torch.zeros(2, 32)
    x[0, 0], x[1, 0] = 3e38, 1e-40
    for name, rule in itertools.product(ELEMENTS, MX_RULES):
        assert equals(x, spec(name, rule, "e8m0")), (name, rule)


def test_no_rows_make_no_blocks() -> None:
    x = torch.zeros(0, 64)
    assert in_blocks(x, spec("e2m1", "search", "e4m3")).scales.shape == (0, 4)
    assert in_blocks(x, spec("e2m1", "search", "e8m0")).scales.shape == (0, 2)
    assert swizzled(torch.zeros(0, 4, dtype=torch.uint8)).shape == (0,)


def test_the_even_element_is_low() -> None:
    codes = torch.arange(8, dtype=torch.uint8).view(1, 8)
    assert pairs(codes).tolist() == [[0x10, 0x32, 0x54, 0x76]]


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (130, 5), (31, 12), (256, 8)], ids=str)
def test_scales_lie_where_the_documentation_has_them(shape: tuple[int, int]) -> None:
    rows, groups = shape
    scales = torch.randint(1, 256, shape).to(torch.uint8)
    order = swizzled(scales)
    across = -(-groups // 4)
    assert len(order) == -(-rows // 128) * across * 512
    for r, b in itertools.product(range(rows), range(groups)):
        tile, r_in, b_in = (r // 128) * across + b // 4, r % 128, b % 4
        place = 512 * tile + 16 * (r_in % 32) + 4 * (r_in // 32) + b_in
        assert order[place] == scales[r, b]
    assert int((order != 0).sum()) == rows * groups  # the rest is padding


# ---- a second opinion


def test_torchao_orders_scales_and_pairs_alike() -> None:
    pytest.importorskip("torchao")
    from torchao.prototype.mx_formats.kernels import pack_uint4
    from torchao.prototype.mx_formats.utils import to_blocked

    for shape in ((1, 1), (130, 5), (256, 8)):
        scales = torch.randint(256, shape).to(torch.uint8)
        assert torch.equal(swizzled(scales), to_blocked(scales))
    codes = torch.randint(16, (5, 32)).to(torch.uint8)
    assert torch.equal(pairs(codes), pack_uint4(codes))


@dtypes
@pytest.mark.parametrize("rule", MX_RULES[:4])
@pytest.mark.parametrize("name", ELEMENTS)
def test_torchao_makes_the_same_mx_blocks(name: str, rule: str, dtype: torch.dtype) -> None:
    pytest.importorskip("torchao")
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.constants import DTYPE_FP6_E2M3, DTYPE_FP6_E3M2
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    element = {
        "e2m1": torch.float4_e2m1fn_x2, "e4m3": torch.float8_e4m3fn,
        "e2m3": DTYPE_FP6_E2M3, "e3m2": DTYPE_FP6_E3M2,
    }[name]  # fmt: skip
    x = torch.randn(33, 256).to(dtype)
    x *= torch.exp(torch.randn(33, 1) * 3).to(dtype)
    scales, elements = to_mx(x, element, 32, ScaleCalculationMode(rule))
    blocks = in_blocks(x, spec(name, rule, "e8m0"))
    assert torch.equal(blocks.scales, scales.view(torch.uint8))
    mine = pairs(blocks.codes) if name == "e2m1" else blocks.codes
    assert torch.equal(mine, elements.view(torch.uint8))


@dtypes
def test_torchao_makes_the_same_nvfp4_blocks(dtype: torch.dtype) -> None:
    """Row by row: a token's outer scale is its own here, and one for all there."""
    pytest.importorskip("torchao")
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

    x = torch.randn(33, 256).to(dtype)
    blocks = in_blocks(x, spec("e2m1", "nearest", "e4m3"))
    for row in range(len(x)):
        outer = per_tensor_amax_to_scale(x[row].abs().max())
        assert outer == blocks.outer[row, 0]
        scales, elements = nvfp4_quantize(x[row : row + 1], 16, outer)
        assert torch.equal(blocks.scales[row : row + 1], scales.view(torch.uint8))
        # It multiplies by a rounded reciprocal, which moves what lies next to a tie by one code.
        mine = pairs(blocks.codes[row : row + 1])
        assert int((mine != elements).sum()) <= 1


def test_levels_of_e2m1_are_those_of_the_export() -> None:
    from dq.export.forms import e2m1_pairs

    codes = formats["e2m1"].encode(torch.randn(3, 32) * 3)
    assert torch.equal(pairs(codes), e2m1_pairs(codes))
