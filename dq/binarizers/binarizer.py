"""What a binarizer is: it makes a weight of few bits of a latent one, and learns with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dq.bases import signs
from dq.quantize import dequantize, straight_through
from dq.scales import Scales
from dq.spec import Granularity, TensorSpec

__all__ = ["Binarizer", "Exported"]

_MULTIPLIER = "uint6"  # signs times 1 to 64 are 8-bit integers
_MOST = 64


def _two_levels(size: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scale of each row `(N, 1, 1)`, and the multipliers `(N, G, 1)` of its groups."""
    row = (size.amax(1, keepdim=True) / _MOST).clamp_min(1e-12)
    return row, torch.round(size / row).clamp(1, _MOST)


class Exported(NamedTuple):
    """What is stored of a weight.

    Attributes:
        codes: `(N, K)` uint8.
        scales: Of them.
        spec: How they are to be read: value = `dequantize(codes, scales, spec)`.
    """

    codes: Tensor
    scales: Scales
    spec: TensorSpec

    @property
    def value(self) -> Tensor:
        """The weight that is stored, `(N, K)` float32."""
        return dequantize(self.codes, self.scales, self.spec)

    @property
    def bits(self) -> int:
        """Bits of all that is stored: codes, scales and offsets."""
        return 8 * self.spec.bytes(*self.codes.shape)


class Binarizer(nn.Module, ABC):
    """Makes a weight of few bits of a latent weight `(N, K)`, with gradients to both.

    Scales are parameters, and so part of the state of a training.

    Args:
        matrix: `(N, K)` floating point, that the scales are made for.
        group: Columns that share a scale; 0 for all of a row.
    """

    progress: float = 0.0

    def __init__(self, matrix: Tensor, group: int = 0) -> None:
        super().__init__()
        self.group = group
        self.blocks = Granularity("group", group) if group else Granularity("channel")
        self.blocks.blocks(*matrix.shape)  # says it if the group does not fit

    def parts(self, matrix: Tensor) -> Tensor:
        """View a matrix as `(N, G, n)`, n columns that share a scale."""
        rows, groups = self.blocks.blocks(*matrix.shape)
        return matrix.float().reshape(rows, groups, -1)

    def one_level(self, name: str) -> TensorSpec:
        """Return the spec of codes with one scale a block: groups have two-level scales."""
        multiplier = _MULTIPLIER if self.group else "float32"
        return TensorSpec(name, self.blocks, observer="mse", scale_format=multiplier)

    def written(self, scale: Tensor) -> Tensor:
        """Return scales as they are stored: of groups whole multiples of a row's, straight through.

        Args:
            scale: `(N, G, 1)`, of any sign.
        """
        if not self.group:
            return scale
        row, multiplier = _two_levels(scale.detach().abs())
        value = signs(scale.detach()) * row * multiplier
        return straight_through(scale, value)

    def stored(self, scale: Tensor) -> Scales:
        """Return the magnitudes of scales `(N, G, 1)` in the form that is stored."""
        size = scale.detach().abs().clamp_min(1e-12)
        if not self.group:
            return Scales(size.squeeze(-1))
        row, multiplier = _two_levels(size)
        return Scales(row.squeeze(-1), None, multiplier.squeeze(-1))

    @property
    @abstractmethod
    def spec(self) -> TensorSpec:
        """How what it exports is stored."""

    @abstractmethod
    def forward(self, matrix: Tensor) -> Tensor:
        """Return the weight `(N, K)` float32 that is computed with, differentiable."""

    @abstractmethod
    def export(self, matrix: Tensor) -> Exported:
        """Return what is stored of it; its value is that of `forward` at the end of training."""

    def regularizer(self) -> Tensor:
        """Return what is to be added to the loss, a scalar."""
        return torch.zeros(())

    def at(self, progress: float) -> None:
        """Say how far training is, 0 to 1."""
        self.progress = progress
