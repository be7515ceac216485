"""NVFP4 and MX linears through `scaled_mm`: CUDA from compute capability 10.0, Blackwell.

The tensor cores multiply each block by its scale themselves. Sums leave the op as bfloat16; the
float32 scales of NVFP4, one of the weight and one a row of the input, are applied after that, the
bias last.

| kernel | elements                      | blocks of | made for                                 |
|--------|-------------------------------|-----------|------------------------------------------|
| NVFP4  | e2m1, two a byte              | 16        | any Blackwell                            |
| MXFP4  | e2m1, two a byte              | 32        | 10.x, where torch was built with MSLK    |
| MXFP8  | e4m3, or what e4m3 has levels | 32        | any Blackwell; 4 bits run as fast as 8   |
|        | for: e2m1, e2m3, e3m2         |           |                                          |

Weights lie in other orders than `dq.storage` has them: that form is kept beside the stored one if
it is no larger, or if the layer says that it may be. Of N the op takes multiples of 16, of K of 32,
of tokens any number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

from dq.kernels.block_scales import Blocks, decoded, in_blocks, pairs, swizzled
from dq.kernels.copies import kept
from dq.kernels.kernel import SCHEMA, Arguments, Kernel, Site, kernels
from dq.kernels.sample import near
from dq.kernels.scaled_mm import as_e4m3, capability
from dq.packing import pack, packed_length, unpack
from dq.spec import Granularity, TensorSpec

__all__ = ["linear"]


@dataclass(frozen=True)
class _Recipe:
    """What the three kernels differ in.

    Attributes:
        recipe: torch's name.
        elements: Dtype of elements; of float4_e2m1fn_x2 two lie in a byte.
        scales: Dtype of the scales of blocks.
        scale_format: The same in `dq.formats`.
        size: Elements in a block.
    """

    recipe: ScalingType
    elements: torch.dtype
    scales: torch.dtype
    scale_format: str
    size: int

    @property
    def is_fp4(self) -> bool:
        """Whether two elements lie in a byte."""
        return self.elements == torch.float4_e2m1fn_x2


_RECIPES = {
    "nvfp4": _Recipe(
        ScalingType.BlockWise1x16, torch.float4_e2m1fn_x2, torch.float8_e4m3fn, "e4m3", 16
    ),
    "mxfp4": _Recipe(
        ScalingType.BlockWise1x32, torch.float4_e2m1fn_x2, torch.float8_e8m0fnu, "e8m0", 32
    ),
    "mxfp8": _Recipe(
        ScalingType.BlockWise1x32, torch.float8_e4m3fn, torch.float8_e8m0fnu, "e8m0", 32
    ),
}


def _spec(kind: str, name: str, rule: str = "search") -> TensorSpec:
    """Return the spec of an input, by the name of its elements' format."""
    of = _RECIPES[kind]
    blocks = Granularity("group", of.size)
    return TensorSpec(name, blocks, dynamic=True, scale_format=of.scale_format, scale_rule=rule)


def _blocks(x: Tensor, kind: str, a: Arguments) -> Blocks:
    return in_blocks(x, _spec(kind, a.input_format, a.input_rule))


def _stored(a: Arguments) -> Blocks:
    """Return codes and scales of a weight as they are stored, but unpacked."""
    packed = a.weight.flatten(1)
    length = packed_length(a.columns, a.weight_bits)
    codes = unpack(packed[:, :length], a.weight_bits, a.columns)
    return Blocks(codes, packed[:, length:], a.scale.view(1, 1))


def _operand(blocks: Blocks, kind: str, name: str) -> tuple[Tensor, Tensor]:
    """Return elements and scales as the op takes them, uint8, of tensors of their own."""
    if _RECIPES[kind].is_fp4:
        elements = pairs(blocks.codes)
    else:
        elements = as_e4m3(blocks.codes, name).view(torch.uint8)
        # Codes of 8 bits are a part of the stored rows, whose length cuBLAS does not take.
        elements = elements.contiguous()
    return elements, swizzled(blocks.scales)


def _weight(kind: str, a: Arguments) -> tuple[Tensor, Tensor]:
    def make() -> tuple[Tensor, Tensor]:
        return _operand(_stored(a), kind, a.weight_format)

    if a.keep or _RECIPES[kind].is_fp4:
        elements, scales = kept(a.weight, kind, make)
        return elements, scales
    return make()


def _product(elements: Tensor, scales: Tensor, kind: str, a: Arguments) -> Tensor:
    """Return the product `(R, N)` bfloat16 with the weight, without scales beyond the blocks'."""
    if not len(elements):
        return _empty(elements, a)
    its, of = _weight(kind, a), _RECIPES[kind]
    return scaled_mm(
        elements.view(of.elements),
        its[0].view(of.elements).t(),
        scale_a=scales.view(of.scales),
        scale_recipe_a=of.recipe,
        scale_b=its[1].view(of.scales),
        scale_recipe_b=of.recipe,
        swizzle_a=SwizzleType.SWIZZLE_32_4_4,
        swizzle_b=SwizzleType.SWIZZLE_32_4_4,
        output_dtype=torch.bfloat16,
    )


def _empty(elements: Tensor, a: Arguments) -> Tensor:
    return elements.new_empty(elements.shape[0], a.weight.shape[0], dtype=torch.bfloat16)


# To torch.compile a product is one opaque op; the quantization before it is not.
torch.library.define(
    "dq::block_scaled", f"(Tensor elements, Tensor scales, str kind, {SCHEMA}) -> Tensor"
)


@torch.library.impl("dq::block_scaled", ("cpu", "cuda"))
def _(elements: Tensor, scales: Tensor, kind: str, *rest: Any) -> Tensor:
    return _product(elements, scales, kind, Arguments(*rest))


@torch.library.register_fake("dq::block_scaled")
def _(elements: Tensor, scales: Tensor, kind: str, *rest: Any) -> Tensor:
    return _empty(elements, Arguments(*rest))


def linear(x: Tensor, a: Arguments, kind: str) -> Tensor:
    """Linear layer in blocks: `(..., C)` to `(..., N)`, in the dtype of `x`.

    Args:
        x: Floating point.
        a: The layer.
        kind: Of the product: "nvfp4", "mxfp4" or "mxfp8".
    """
    low = _blocks(x.reshape(-1, x.shape[-1]).contiguous(), kind, a)
    elements, scales = _operand(low, kind, a.input_format)
    if torch.compiler.is_compiling():
        y = torch.ops.dq.block_scaled(elements, scales, kind, *a)
    else:
        y = _product(elements, scales, kind, a)
    if kind == "nvfp4":
        y = y * (low.outer * a.scale)  # float32
    if a.bias is not None:
        y = y.float() + a.bias
    return y.to(x.dtype).view(*x.shape[:-1], len(a.weight))


def _refuses(kind: str) -> Callable[[Site], str | None]:
    served = ("mxfp4", "mxfp8") if kind == "mxfp8" else (kind,)

    def refuses(site: Site) -> str | None:
        if site.kind != "linear" or site.device != "cuda":
            return "it is a linear kernel for CUDA"
        if site.weight not in served or site.input not in served:
            return f"it multiplies {' and '.join(served)} only"
        if site.rows % 16 or site.columns % 32:
            return f"it takes multiples of 32 -> 16 only, not {site.columns} -> {site.rows}"
        if torch.version.hip or capability() < (10, 0):
            return "the card multiplies no blocks"
        if kind == "mxfp4" and capability()[0] != 10:
            return "torch has it for compute capability 10 only"
        return None

    return refuses


def _sample(kind: str, device: torch.device) -> tuple[Tensor, Arguments]:
    """Return an input and a layer of more than one tile of scales each way, none of them full."""
    generator = torch.Generator().manual_seed(0)
    rows, columns, size = 144, 288, _RECIPES[kind].size

    def spread(rows: int) -> Tensor:
        """Return numbers whose blocks have scales far apart, so that none can stand for others."""
        powers = torch.randint(-3, 4, (rows, columns // size), generator=generator)
        numbers = torch.randn(rows, columns, generator=generator)
        return torch.ldexp(numbers.unflatten(1, (-1, size)), powers.unsqueeze(-1)).flatten(1)

    name = "e4m3" if kind == "mxfp8" else "e2m1"
    a = Arguments(
        weight=torch.empty(0), scale=torch.tensor([0.37 if kind == "nvfp4" else 1.0]), bias=None,
        input_affine=None, weight_bits=8 if kind == "mxfp8" else 4, columns=columns,
        multiplier_bits=8, groups=columns // size, input_bits=8 if kind == "mxfp8" else 4,
        segments=[], keep=False, weight_format=name, input_format=name,
        input_rule="nearest" if kind == "nvfp4" else "rceil",
    )  # fmt: skip
    weight = _blocks(spread(rows), kind, a)
    packed = torch.cat([pack(weight.codes, a.weight_bits), weight.scales], dim=1)
    x = spread(137).to(device)
    return x, a._replace(weight=packed.to(device), scale=a.scale.to(device))


def _check(kind: str, device: torch.device) -> bool:
    x, a = _sample(kind, device)
    restored = decoded(_blocks(x, kind, a), _spec(kind, a.input_format))
    weight = decoded(_stored(a), _spec(kind, a.weight_format))
    return near(linear(x, a, kind), restored, weight)


_WORDS = {"nvfp4": "fp4 gemm (NVFP4", "mxfp4": "fp4 gemm (MXFP4", "mxfp8": "fp8 gemm (MXFP8"}

for _kind, _words in _WORDS.items():
    kernels.add(
        f"block_{_kind}",
        Kernel(
            f"{_words}, bf16 out)",
            3 if _kind == "mxfp4" else 2,  # MXFP8 takes such weights and inputs too
            _refuses(_kind),
            partial(linear, kind=_kind),
            partial(_check, _kind),
        ),
    )
