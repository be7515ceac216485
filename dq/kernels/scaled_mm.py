"""FP8 linear through `torch._scaled_mm`, row-wise scales: CUDA from compute capability 8.9.

Operands are e4m3, one scale a token and one an output channel; the sum is float32. CPUs have the op
too, six to eleven times slower than bf16, so it is not chosen there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dq.kernels.kernel import Arguments, Kernel, Site, kernels

__all__ = ["linear"]

_TOP = 448.0  # largest e4m3 level; clamped to before every cast, since overflow differs by version


def linear(x: Tensor, a: Arguments) -> Tensor:
    """E4M3 linear layer: `(..., C)` to `(..., N)`, in the dtype of `x`."""
    rows = x.reshape(-1, x.shape[-1])
    if a.input_affine is None:
        reach = rows.abs().amax(dim=1, keepdim=True).float()
        step = (reach / _TOP).clamp_min_(torch.finfo(torch.float32).tiny)
    else:
        step = a.input_affine[:, :1].expand(len(rows), 1).contiguous()
    codes = (rows.float() / step).clamp_(-_TOP, _TOP).to(torch.float8_e4m3fn)
    weight = a.weight.view(torch.float8_e4m3fn)
    y = torch._scaled_mm(codes, weight.t(), step, a.scale.view(1, -1), out_dtype=torch.bfloat16)
    y = y.to(x.dtype)
    return (y if a.bias is None else y + a.bias).view(*x.shape[:-1], -1)


def _refuses(site: Site) -> str | None:
    if site.kind != "linear" or site.device != "cuda":
        return "it is a linear kernel for CUDA"
    if site.weight != "e4m3" or site.input != "e4m3":
        return "it multiplies e4m3 only"
    if torch.cuda.get_device_capability() < (8, 9):
        return "the card has no fp8 units"
    if site.rows % 16 or site.columns % 16:
        return f"it takes multiples of 16 only, not {site.columns} -> {site.rows}"
    return None


def _check(device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 64, generator=generator).to(device)
    weight = torch.randn(48, 64, generator=generator).clamp(-3, 3).to(device)
    codes = weight.to(torch.float8_e4m3fn)
    a = Arguments(
        weight=codes.view(torch.uint8), scale=torch.ones(48, device=device), bias=None,
        input_affine=None, weight_bits=8, columns=64, multiplier_bits=0, groups=0, input_bits=8,
        segments=[],
    )  # fmt: skip
    expected = x @ codes.float().t()
    return bool((linear(x, a) - expected).norm() < 0.05 * expected.norm())


kernels.add("scaled_mm", Kernel("fp8 gemm (_scaled_mm)", 2, _refuses, linear, _check))
