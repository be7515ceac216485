"""Layers whose input is changed before it is quantized; see `dq.transform`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from dq.transform import Transform

__all__ = ["changed_bias", "conv_groups", "convolved", "entered"]


def conv_groups(layer: Any) -> int:
    """Return the groups of a convolution; 1 for linears."""
    return layer.groups if isinstance(layer, nn.Conv2d) else 1


def entered(layer: Any, x: Tensor, transform: Transform) -> Tensor:
    """Return what enters the product of a layer, before it is quantized.

    Args:
        layer: Linear or Conv2d, float, simulated or packed.
        x: Its input.
        transform: How it is changed. Where that moves zero, images are padded first.
    """
    if transform.spec is None:
        return x
    linear = isinstance(layer, nn.Linear)
    if transform.shift is not None and not linear:
        x = padded(layer, x)
    return transform.input(x, -1 if linear else 1)


def padded(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Return an image with the border that a convolution would give it."""
    border = layer._reversed_padding_repeated_twice
    if not any(border):
        return x
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, border, mode=mode)


def convolved(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the product of a convolution with what `entered` has returned."""
    transform: Transform = layer.transform
    if transform.shift is None:
        y: Tensor = layer._conv_forward(x, weight, bias)
        return y
    return F.conv2d(x, weight, bias, layer.stride, 0, layer.dilation, layer.groups)


def changed_bias(
    weight: Tensor, bias: Tensor | None, transform: Transform, groups: int
) -> Tensor | None:
    """Return the bias that belongs to a changed input, in the dtype of the weight.

    Args:
        weight: The layer's own, not changed.
        bias: Likewise, or None.
        transform: Of the input.
        groups: Of a convolution.
    """
    offset = transform.offset(weight, groups)
    if offset is None:
        return bias
    return (offset if bias is None else offset + bias.float()).to(weight.dtype)
