"""FP8 linear through `torch._scaled_mm`, row-wise scales: CUDA from compute capability 8.9.

Operands are e4m3, one scale a token and one an output channel; the sum is float32. Other floats
whose levels e4m3 has too (e2m1, e2m3, e3m2...) are multiplied as e4m3: their codes are looked up in
a table, at each call or once. Sums leave the op as bfloat16, whatever the input's dtype: with
row-wise scales that is the dtype that every card gives. The bias is added after that.

Of N and K the op takes multiples of 16 only; of tokens any number, padded by none (torch's own
tests run 1, 2, 31 and 1025 of them).

CPUs have the op too, six to eleven times slower than bf16, so it is not chosen there.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from dq.formats import formats
from dq.kernels.copies import kept
from dq.kernels.kernel import SCHEMA, Arguments, Kernel, Site, kernels
from dq.kernels.sample import near
from dq.packing import pack, packed_length, unpack
from dq.scales import usable

__all__ = ["as_e4m3", "capability", "e4m3_codes", "linear"]


def capability() -> tuple[int, int]:
    """Return the compute capability of the current card; (0, 0) without one."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)


def as_e4m3(codes: Tensor, name: str) -> Tensor:
    """Return the levels of uint8 codes as float8_e4m3fn.

    Args:
        codes: Any shape.
        name: Of their format, whose levels are e4m3 ones.
    """
    if name != "e4m3":
        # Graphs take it as a constant of theirs.
        table = _e4m3_bytes if torch.compiler.is_compiling() else _kept_e4m3_bytes
        codes = table(name, codes.device)[codes.int()]
    return codes.view(torch.float8_e4m3fn)


def _e4m3_bytes(name: str, device: torch.device) -> Tensor:
    """Return the e4m3 code of each code of a format, uint8."""
    grid = formats[name]
    every = torch.arange(1 << grid.bits, device=device).to(torch.uint8)
    return formats["e4m3"].encode(grid.decode(every))


_kept_e4m3_bytes = functools.cache(_e4m3_bytes)


def e4m3_codes(a: Arguments) -> Tensor:
    """Return the levels of a stored weight, `(N, K)` float8_e4m3fn."""
    packed = a.weight.flatten(1)[:, : packed_length(a.columns, a.weight_bits)]
    return as_e4m3(unpack(packed, a.weight_bits, a.columns), a.weight_format)


def _weight(a: Arguments) -> Tensor:
    if a.weight_format == "e4m3" or not a.keep:  # the former are the stored bytes themselves
        return e4m3_codes(a)
    return kept(a.weight, "e4m3", lambda: (e4m3_codes(a),))[0]


def _quantized(rows: Tensor, a: Arguments) -> tuple[Tensor, Tensor]:
    """Return levels `(R, K)` float8_e4m3fn and scales `(R, 1)` float32 of an input."""
    grid = formats[a.input_format]
    if a.input_affine is None:
        step = usable(rows.abs().amax(dim=1, keepdim=True).float() / grid.high)
    else:
        step = a.input_affine[:, :1].expand(len(rows), 1).contiguous()
    return as_e4m3(grid.encode(rows.float() / step), a.input_format), step


def _by_row(codes: Tensor, step: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    # Hopper takes row-major times column-major only.
    row = scale.view(1, -1)
    return torch._scaled_mm(codes, weight.t(), step, row, out_dtype=torch.bfloat16)


def _by_tensor(codes: Tensor, step: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return the same, scaled in a second pass."""
    one = step.new_ones(())
    y = torch._scaled_mm(codes, weight.t(), one, one, out_dtype=torch.bfloat16)
    return (y * step * scale).to(torch.bfloat16)


def _product(codes: Tensor, step: Tensor, a: Arguments) -> Tensor:
    """Return the scaled product `(R, N)` bfloat16."""
    if not len(codes):  # the strides of an empty scale are not what the op asks for
        return _empty(codes, a)
    operands = codes, step, _weight(a), a.scale
    try:
        return _by_row(*operands)
    except RuntimeError as error:
        # cuBLAS has no row-wise kernel for some sizes on Hopper: few tokens, 9216 -> 3072
        # (pytorch/ao issue 4582). It says so before anything runs.
        if "NOT_SUPPORTED" not in str(error):
            raise
        return _by_tensor(*operands)


def _empty(codes: Tensor, a: Arguments) -> Tensor:
    return codes.new_empty(codes.shape[0], a.weight.shape[0], dtype=torch.bfloat16)


# To torch.compile a product is one opaque op; the quantization before it is not.
torch.library.define("dq::scaled_mm", f"(Tensor codes, Tensor step, {SCHEMA}) -> Tensor")


@torch.library.impl("dq::scaled_mm", ("cpu", "cuda"))
def _(codes: Tensor, step: Tensor, *rest: Any) -> Tensor:
    return _product(codes.view(torch.float8_e4m3fn), step, Arguments(*rest))


@torch.library.register_fake("dq::scaled_mm")
def _(codes: Tensor, step: Tensor, *rest: Any) -> Tensor:
    return _empty(codes, Arguments(*rest))


def linear(x: Tensor, a: Arguments) -> Tensor:
    """FP8 linear layer: `(..., C)` to `(..., N)`, in the dtype of `x`."""
    codes, step = _quantized(x.reshape(-1, x.shape[-1]).contiguous(), a)
    if torch.compiler.is_compiling():
        y = torch.ops.dq.scaled_mm(codes.view(torch.uint8), step, *a)
    else:
        y = _product(codes, step, a)
    y = y.to(x.dtype)
    if a.bias is not None:
        y = (y + a.bias).to(x.dtype)
    return y.view(*x.shape[:-1], len(a.weight))


def _refuses(site: Site) -> str | None:
    if site.kind != "linear" or site.device != "cuda":
        return "it is a linear kernel for CUDA"
    if site.weight != "fp8" or site.input != "fp8":
        return "it multiplies floats with a scale a row only"
    if site.rows % 16 or site.columns % 16:
        return f"it takes multiples of 16 only, not {site.columns} -> {site.rows}"
    return "the card has no fp8 units" if capability() < (8, 9) else None


def _check(device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, 64, generator=generator).to(device)
    codes = torch.randint(16, (48, 64), generator=generator).to(torch.uint8)
    scale = (torch.rand(48, generator=generator) + 0.5).to(device)
    a = Arguments(
        weight=pack(codes, 4).to(device), scale=scale, bias=None, input_affine=None, weight_bits=4,
        columns=64, multiplier_bits=0, groups=0, input_bits=8, segments=[], keep=False,
        weight_format="e2m1", input_format="e4m3",
    )  # fmt: skip
    levels, step = _quantized(x, a)
    weight = e4m3_codes(a)
    restored = levels.float() * step, weight.float() * scale[:, None]
    ways = linear(x, a), _by_tensor(levels, step, weight, scale)
    return all(near(y, *restored) for y in ways)


kernels.add("scaled_mm", Kernel("fp8 gemm (_scaled_mm, bf16 out)", 2, _refuses, linear, _check))
