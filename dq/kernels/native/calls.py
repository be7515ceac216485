"""The compiled functions with tensors as arguments. Callers ask `library()` first."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from dq.kernels.kernel import Affine, Arguments
from dq.kernels.live_blocks import LiveBlocks
from dq.kernels.native.build import library
from dq.packing import packed_length

__all__ = [
    "DTYPES",
    "attention",
    "expand",
    "group_norm",
    "has_attention",
    "linear_rows",
    "quantize_planes",
    "quantize_rows",
    "quantize_tokens",
    "rescale",
]

DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # of activations; as in common.h

_Strides = ctypes.c_int64 * 3
_int, _long, _float, _at = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p

_ATTENTION: tuple[type[Any], ...] = (
    *[_at] * 4,
    *[_Strides] * 4,
    *[_long] * 5,
    _float,
    _at,
    *[_long] * 3,
    _at,
    _at,
)

# Types of the arguments, as the sources declare them.
_SIGNATURES: dict[str, tuple[type[Any], ...]] = {
    "quantize_rows": (_at, _int, _long, _long, _long, _float, _int, _int, _at),
    "quantize_planes": (_at, _int, _long, _long, _float, _int, _int, _at),
    "quantize_tokens": (_at, _int, _long, _long, _long, _int, _at, _at),
    "rescale": (_at, _long, _long, _at, _at, _at, _int),
    "expand": (_at, *[_long] * 5, _int, _int, _long, _long, *[_at] * 4),
    "linear_rows": (
        _at,
        _int,
        _long,
        _long,
        _long,
        _float,
        _float,
        _int,
        _int,
        _at,
        _long,
        _long,
        _long,
        _long,
        _int,
        _int,
        _at,
        _at,
        _at,
    ),
    "attention": _ATTENTION,
    "attention_float": _ATTENTION,
    "group_norm": (_at, _int, _long, _long, _long, _long, _float, _at, _at, _at),
    "has_attention": (),
}


@functools.cache
def _function(name: str) -> Callable[..., int]:
    found = library()
    assert found is not None  # callers have asked
    function = getattr(found, f"dq_{name}")
    function.argtypes = _SIGNATURES[name]
    return cast(Callable[..., int], function)


def _call(name: str, *arguments: Any) -> None:
    """Call a function; a profiler sees it as an operator of its own.

    Raises:
        MemoryError: If it says that there is none.
    """
    if torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        with torch.profiler.record_function(f"native::{name}"):
            failed = _function(name)(*arguments)
    else:
        failed = _function(name)(*arguments)
    if failed:
        raise MemoryError(f"no memory for {name}")


def quantize_rows(x: Tensor, inverse: float, zero: int, top: int) -> Tensor:
    """Return `clamp(round(x * inverse) + zero, 0, top)`, uint8, dense.

    Args:
        x: `(R, C)` float32 or bfloat16, columns side by side.
        inverse: One over the scale, a float32 number.
        zero: Code of zero.
        top: Largest code.
    """
    rows, columns = x.shape
    out = torch.empty(rows, columns, dtype=torch.uint8)
    _call(
        "quantize_rows", x.data_ptr(), DTYPES[x.dtype], rows, columns, x.stride(0),
        inverse, zero, top, out.data_ptr(),
    )  # fmt: skip
    return out


def quantize_planes(x: Tensor, inverse: float, zero: int, top: int) -> Tensor:
    """Return codes of images, channels last.

    Args:
        x: `(B, C, H, W)`, each image dense with its pixels side by side.
        inverse: One over the scale, a float32 number.
        zero: Code of zero.
        top: Largest code.
    """
    batch, channels, height, width = x.shape
    out = torch.empty(
        x.shape, dtype=torch.uint8, memory_format=torch.channels_last, device=x.device
    )
    for index in range(batch):
        _call(
            "quantize_planes", x[index].data_ptr(), DTYPES[x.dtype], channels, height * width,
            inverse, zero, top, out[index].data_ptr(),
        )  # fmt: skip
    return out


def quantize_tokens(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Return codes `(R, C)` and scales `(R, 1)`, one symmetric scale a row.

    Args:
        x: `(R, C)` float32 or bfloat16, columns side by side.
        top: Largest code; the code of zero is `(top + 1) / 2`.
    """
    rows, columns = x.shape
    out = torch.empty(rows, columns, dtype=torch.uint8)
    scales = torch.empty(rows, 1)
    _call(
        "quantize_tokens", x.data_ptr(), DTYPES[x.dtype], rows, columns, x.stride(0), top,
        out.data_ptr(), scales.data_ptr(),
    )  # fmt: skip
    return out, scales


def rescale(x: Tensor, scales: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x * scales + bias` in `dtype`.

    Args:
        x: `(R, N)` float32, dense.
        scales: `(R, 1)` float32.
        bias: `(N,)` float32.
        dtype: One of `DTYPES`.
    """
    y = torch.empty(x.shape, dtype=dtype)
    _call(
        "rescale", x.data_ptr(), x.shape[0], x.shape[1], scales.data_ptr(), bias.data_ptr(),
        y.data_ptr(), DTYPES[dtype],
    )  # fmt: skip
    return y


def expand(
    a: Arguments, first: int, row_offsets: Tensor, column_offsets: Tensor, out: int, sums: int
) -> None:
    """Write packed weights as int8 into memory that is laid out as the offsets say.

    Args:
        a: The stored weight.
        first: The first column that is written.
        row_offsets: `(N,)` int32.
        column_offsets: `(C,)` int32, of the C columns from `first` on.
        out: Address of the int8 weights.
        sums: Address where minus the sum of each row is written as int32; 0 for nowhere.

    Raises:
        MemoryError: If there is none.
    """
    _call(
        "expand",
        a.weight.data_ptr(), a.weight.stride(0), packed_length(a.columns, a.weight_bits),
        len(a.weight), a.columns, a.groups, a.weight_bits, a.multiplier_bits,
        first, len(column_offsets), row_offsets.data_ptr(), column_offsets.data_ptr(), out, sums,
    )  # fmt: skip


def linear_rows(x: Tensor, a: Arguments, affine: Affine | None, bias: Tensor) -> Tensor:
    """Return a whole integer linear layer, in the dtype of its input; see `dq.kernels.integer`.

    Args:
        x: `(R, K)` float32 or bfloat16, columns side by side.
        a: The layer.
        affine: Of a static input; None for one with a scale a row.
        bias: `(N,)` float32; zeros for none.

    Returns:
        `(R, N)`.

    Raises:
        MemoryError: If there is none.
    """
    rows, columns = x.shape
    y = torch.empty(rows, len(a.weight), dtype=x.dtype)
    scale, inverse, zero = affine or (0.0, 0.0, 0)
    _call(
        "linear_rows",
        x.data_ptr(), DTYPES[x.dtype], rows, columns, x.stride(0), inverse, scale, zero,
        (1 << a.input_bits) - 1, a.weight.data_ptr(), a.weight.stride(0),
        packed_length(columns, a.weight_bits), len(a.weight), a.groups, a.weight_bits,
        a.multiplier_bits, a.scale.data_ptr(), bias.data_ptr(), y.data_ptr(),
    )  # fmt: skip
    return y


def has_attention(dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether the library can compute `attention`: in bfloat16 it needs AVX512-BF16."""
    found = library()
    if found is None or dtype not in DTYPES:
        return False
    return dtype == torch.float32 or bool(_function("has_attention")())


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, blocks: LiveBlocks | None = None
) -> Tensor:
    """Return `softmax(scale * q k^T) v`.

    Args:
        q: `(B, H, N, D)` bfloat16 or float32, in any layout whose features lie side by side.
        k: `(B, H, M, D)` likewise, of that dtype.
        v: `(B, H, M, D)` likewise.
        scale: Positive.
        blocks: Order of the tokens, and which blocks count: of keys that are a multiple of 16,
            queries of 8. None for all.

    Returns:
        `(B, H, N, D)` of that dtype; the heads of a token lie side by side.

    Raises:
        MemoryError: If there is none.
    """
    batch, heads, tokens, depth = q.shape
    out = torch.empty(batch, tokens, heads, depth, dtype=q.dtype).transpose(1, 2)
    sparse: tuple[int, ...] = (0,) * 6
    if blocks is not None:
        table, (counts, numbers) = blocks.table, blocks.lists
        sparse = (
            table.data_ptr(), table.shape[1], *blocks.block, counts.data_ptr(), numbers.data_ptr()
        )  # fmt: skip
    _call(
        "attention" if q.dtype == torch.bfloat16 else "attention_float",
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(),
        *(_Strides(*t.stride()[:3]) for t in (q, k, v, out)),
        batch, heads, tokens, k.shape[2], depth, scale, *sparse,
    )  # fmt: skip
    return out


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Return images normalized group by group, channels last.

    Args:
        x: `(B, C, H, W)` float32 or bfloat16, channels last.
        groups: Of channels.
        weight: `(C,)` float32.
        bias: `(C,)` float32.
        epsilon: Added to variances.

    Raises:
        MemoryError: If there is none.
    """
    batch, channels, height, width = x.shape
    y = torch.empty_like(x, memory_format=torch.channels_last)
    _call(
        "group_norm",
        x.data_ptr(), DTYPES[x.dtype], batch, height * width, channels, groups, epsilon,
        weight.data_ptr(), bias.data_ptr(), y.data_ptr(),
    )  # fmt: skip
    return y
