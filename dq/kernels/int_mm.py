"""Integer linear through `torch._int_mm`: exact, on CUDA and any CPU; scaling is a second pass."""

from __future__ import annotations

import torch
from torch import Tensor

from dq.kernels import reference
from dq.kernels.integer import input_parts, integer_weight
from dq.kernels.kernel import Arguments, Kernel, Site, kernels
from dq.kernels.sample import linear_sample

__all__ = ["linear"]

_CHUNK = (
    1 << 20
)  # outputs scaled at a time on a CPU: larger float32 temporaries are page-faulted anew
_CUDA_ROWS = 17  # cuBLAS takes more than 16 rows only


def linear(x: Tensor, a: Arguments) -> Tensor:
    """Integer linear layer; see `dq.kernels.reference.linear`."""
    rows = x.reshape(-1, x.shape[-1])
    weight = integer_weight(a)
    chunk = len(rows) if x.is_cuda else max(1, _CHUNK // len(weight))
    done = [_product(part, weight, a) for part in rows.split(max(chunk, 1))]
    return torch.cat(done).view(*x.shape[:-1], -1)


def _product(rows: Tensor, weight: Tensor, a: Arguments) -> Tensor:
    total = torch.zeros(len(rows), len(weight), device=rows.device)
    for part in input_parts(rows, a):
        # Signed codes for cuBLAS; what the shift by 128 adds is taken off with the row sums.
        codes = (part.codes ^ 128).view(torch.int8)
        if rows.is_cuda and len(codes) < _CUDA_ROWS:
            codes = torch.nn.functional.pad(codes, (0, 0, 0, _CUDA_ROWS - len(codes)))
        columns = weight[:, part.channels]
        if columns.shape[1] == 1:  # torch 2.13 on a CPU misreads the strides of a single feature
            codes, columns = (torch.nn.functional.pad(t, (0, 1)) for t in (codes, columns))
        product = torch._int_mm(codes.contiguous(), columns.contiguous().t())[: len(rows)]
        if part.zero != 128:
            product = product - (part.zero - 128) * columns.sum(1, dtype=torch.int32)
        total += product * (part.scale * a.scale)
    if a.bias is not None:
        total += a.bias.float()
    return total.to(rows.dtype)


def _refuses(site: Site) -> str | None:
    if site.kind != "linear" or site.device not in ("cpu", "cuda"):
        return "it is a linear kernel for CPUs and CUDA"
    if site.weight != "int8" or site.input != "int8":
        return "it multiplies integers only"
    if site.device == "cuda" and (site.rows % 8 or site.columns % 8):
        return f"cuBLAS takes multiples of 8 only, not {site.columns} -> {site.rows}"
    return None


def _check(device: torch.device) -> bool:
    x, a = linear_sample(device)
    return torch.allclose(linear(x, a), reference.linear(x, a), rtol=1e-5, atol=1e-5)


kernels.add("int_mm", Kernel("int8 gemm (_int_mm)", 1, _refuses, linear, _check))
