"""A denoiser without quantization, or in float32, for a while: no second model is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dq import attention
from dq.calls import mapped
from dq.nn import exchanged, plain_layers

__all__ = ["as_float32", "floated", "full_precision"]


@contextmanager
def full_precision(
    model: nn.Module, layers: Mapping[str, nn.Module] | None = None
) -> Iterator[nn.Module]:
    """While active, a denoiser with simulated layers computes with its own float weights.

    Args:
        model: The denoiser.
        layers: What `dq.nn.plain_layers` has returned for it; made anew if None.

    Yields:
        The model.
    """
    mine = plain_layers(model) if layers is None else layers
    with exchanged(model, mine), attention.exact(model):
        yield model


@contextmanager
def as_float32(model: nn.Module) -> Iterator[None]:
    """While active, the model computes in float32: small noise would drown in that of bfloat16."""
    tensors = [*model.parameters(), *model.buffers()]
    before = [tensor.data for tensor in tensors]
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data


def floated(value: Any, device: torch.device | None = None) -> Any:
    """Return captured arguments in float32, for a model that computes in it.

    Args:
        value: Tensors, mappings of them, or anything else, which stays.
        device: Where to; None leaves tensors where they are.
    """

    def change(tensor: Tensor) -> Tensor:
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        return tensor.to(device or tensor.device, dtype)

    return mapped(value, change)
