"""Facts about torch's own Linear and Conv2d that quantized layers need."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["Layer", "constructor", "describe", "input_channels", "matrix_shape"]

Layer = nn.Linear | nn.Conv2d


def describe(name: str, layer: nn.Module) -> str:
    """Return name and shape of a layer for messages, e.g. `conv_in (Conv2d 4->64)`."""
    if isinstance(layer, nn.Linear):
        return f"{name} (Linear {layer.in_features}->{layer.out_features})"
    if isinstance(layer, nn.Conv2d):
        return f"{name} (Conv2d {layer.in_channels}->{layer.out_channels})"
    return f"{name} ({type(layer).__name__})"


def input_channels(layer: Layer) -> int:
    """Return the number of input channels or features."""
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def matrix_shape(layer: Layer) -> tuple[int, int]:
    """Return N and K of a layer: output features, and features that are summed over."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    height, width = layer.kernel_size
    return layer.out_channels, layer.in_channels // layer.groups * height * width


def constructor(layer: Layer) -> dict[str, Any]:
    """Return the arguments that build a layer of the same shape, without memory for its weight."""
    bias = layer.bias is not None
    arguments: dict[str, Any] = {"bias": bias, "device": torch.device("meta")}
    names: tuple[str, ...] = ("in_features", "out_features")
    if isinstance(layer, nn.Conv2d):
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation",
                 "groups", "padding_mode")  # fmt: skip
    return arguments | {name: getattr(layer, name) for name in names}
