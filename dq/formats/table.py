"""Formats that are a short list of levels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dq.formats.format import Format

__all__ = ["LevelFormat"]


@dataclass(frozen=True)
class LevelFormat(Format):
    """Any short, ascending list of levels; code = position in the list, ties go up.

    With levels (-1, 1) this is BinaryDM's sign function with sign(0) = +1.
    """

    listed: tuple[float, ...]

    @property
    def low(self) -> float:
        """The smallest level."""
        return self.listed[0]

    @property
    def high(self) -> float:
        """The largest level."""
        return self.listed[-1]

    def encode(self, x: Tensor) -> Tensor:
        """See `Format.encode`."""
        # In float64, where the middle between two float32 levels is exact.
        levels = torch.tensor(self.listed, device=x.device).double()
        middles = (levels[1:] + levels[:-1]) / 2
        return torch.bucketize(x.double(), middles, right=True).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """See `Format.decode`; codes beyond the list stand for its last level."""
        return torch.tensor(self.listed, device=codes.device)[codes.int().clamp_max(self._last)]

    @property
    def _last(self) -> int:
        return len(self.listed) - 1
