"""Reference bodies of the integer kernels: slow, exact, everywhere. They define the numerics."""

from __future__ import annotations

import torch
from torch import Tensor

from dq.kernels.integer import input_parts, integer_weight
from dq.kernels.kernel import Arguments, ConvArguments

__all__ = ["conv2d", "linear"]


def linear(x: Tensor, a: Arguments) -> Tensor:
    """Integer linear layer: `(..., C)` to `(..., N)`, in the dtype of `x`."""
    rows = x.reshape(-1, x.shape[-1])
    weight = integer_weight(a).double()
    total = torch.zeros(len(rows), len(weight), device=x.device)
    for part in input_parts(rows, a):
        product = (part.codes.double() - part.zero) @ weight[:, part.channels].T
        total += product.float() * (part.scale * a.scale)
    return _finish(total, a.bias, x).view(*x.shape[:-1], -1)


def conv2d(x: Tensor, a: Arguments, g: ConvArguments) -> Tensor:
    """Integer convolution: `(B, C, H, W)` to `(B, N, H', W')`, in the dtype of `x`."""
    weight = integer_weight(a).double().view(len(a.weight), -1, *g.kernel_size)
    total: Tensor | float = 0.0
    for part in input_parts(x, a):
        product = torch.nn.functional.conv2d(
            part.codes.double() - part.zero, weight[:, part.channels], None, *g[1:]
        )
        total = total + product.float() * (part.scale * a.scale.view(-1, 1, 1))
    assert isinstance(total, Tensor)  # there is at least one part
    return _finish(total, None if a.bias is None else a.bias.view(-1, 1, 1), x)


def _finish(total: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    if bias is not None:
        total = total + bias.float()
    return total.to(x.dtype)
