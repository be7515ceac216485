"""Small known layers, for self-tests of kernels: odd sizes, groups, zero points, segments.

Products of floats are sums that every card rounds in its own way: `near` says what is still right.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dq.kernels.kernel import Arguments, ConvArguments
from dq.packing import pack

__all__ = ["conv_sample", "linear_sample", "near"]

_ROUNDED = 2.0**-7  # bfloat16, twice
_SUMMED = 2.0**-10  # tensor cores drop low bits of what they add up; a wrong term is far larger


def _arguments(rows: int, columns: int, segments: list[int], device: torch.device) -> Arguments:
    generator = torch.Generator().manual_seed(0)

    def codes(shape: tuple[int, ...], bits: int) -> Tensor:
        return torch.randint(1 << bits, shape, generator=generator).to(torch.uint8)

    parts = max(len(segments), 1)
    scale = torch.rand(parts, generator=generator) * 0.01 + 0.01
    a = Arguments(
        weight=torch.cat([pack(codes((rows, n), 4), 4) for n in (columns, 2)], dim=1),
        scale=torch.rand(rows, generator=generator) + 0.5,
        bias=torch.randn(rows, generator=generator),
        input_affine=torch.stack([scale, codes((parts,), 8).float()], dim=1),
        weight_bits=4,
        columns=columns,
        multiplier_bits=4,
        groups=2,
        input_bits=8,
        segments=segments,
    )
    assert a.bias is not None  # set just above
    assert a.input_affine is not None
    return a._replace(
        weight=a.weight.to(device),
        scale=a.scale.to(device),
        bias=a.bias.to(device),
        input_affine=a.input_affine.to(device),
    )


def linear_sample(device: torch.device) -> tuple[Tensor, Arguments]:
    """Return an input `(19, 48)` and the arguments of a 48 to 24 layer with 4-bit groups of 24."""
    x = torch.randn(19, 48, generator=torch.Generator().manual_seed(1))
    return x.to(device), _arguments(24, 48, [], device)


def conv_sample(device: torch.device) -> tuple[Tensor, Arguments, ConvArguments]:
    """Return an input `(2, 12, 7, 5)` and a strided 3x3 convolution, two segments."""
    x = torch.randn(2, 12, 7, 5, generator=torch.Generator().manual_seed(1))
    geometry = ConvArguments([3, 3], [2, 1], [1, 1], [1, 1], 1)
    return x.to(device), _arguments(10, 12 * 9, [5, 7], device), geometry


def near(y: Tensor, x: Tensor, weight: Tensor) -> bool:
    """Whether every element of `y` is that of a product, but for rounding.

    Args:
        y: `(R, N)`, a kernel's output, bfloat16.
        x: `(R, K)`, what the kernel's inputs stand for.
        weight: `(N, K)` likewise.
    """
    x, weight = x.double(), weight.double().t()
    exact = x @ weight
    allowed = _ROUNDED * exact.abs() + _SUMMED * (x.abs() @ weight.abs())
    return bool(((y.double() - exact).abs() <= allowed).all())
