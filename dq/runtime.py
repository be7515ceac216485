"""What else than its packed layers makes a quantized denoiser fast; none of it changes a file."""

from __future__ import annotations

from torch import nn

from dq import attention
from dq.nn import norm

__all__ = ["install", "uninstall"]


def install(model: nn.Module) -> None:
    """Give a denoiser the attention and the norms that suit packed layers, in place."""
    attention.install(model)
    norm.install(model)


def uninstall(model: nn.Module) -> None:
    """Undo `install`."""
    attention.uninstall(model)
    norm.uninstall(model)
