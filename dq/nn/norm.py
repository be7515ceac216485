"""Group normalization where integer convolutions have left images channels last.

torch's own takes about ten times as long in that layout as in the other, on a CPU; to change the
layout back and forth costs as much.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dq.kernels.native import calls, library

__all__ = ["GroupNorm", "install", "uninstall"]


class GroupNorm(nn.GroupNorm):
    """What torch's computes, natively for images that are laid out channels last on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """Map `(B, C, ...)` to the same shape and layout."""
        if torch.compiler.is_compiling() or not self._serves(input):
            return super().forward(input)
        weight, bias = self.weight.float(), self.bias.float()
        return calls.group_norm(input, self.num_groups, weight, bias, self.eps)

    def _serves(self, x: Tensor) -> bool:
        parameters = (self.weight, self.bias)
        return (
            x.dim() == 4
            and x.device.type == "cpu"
            and x.dtype in calls.DTYPES
            and not x.is_contiguous()
            and x.is_contiguous(memory_format=torch.channels_last)
            and self.affine
            and not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters)))
            and library() is not None
        )


def install(model: nn.Module) -> None:
    """Make the group norms of a model native, in place."""
    _exchange(model, nn.GroupNorm, GroupNorm)


def uninstall(model: nn.Module) -> None:
    """Undo `install`."""
    _exchange(model, GroupNorm, nn.GroupNorm)


def _exchange(model: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> None:
    for module in model.modules():
        if type(module) is old:
            module.__class__ = new
