"""Formats that are a short list of levels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dq.formats.format import Format

__all__ = ["LevelFormat"]


@dataclass(frozen=True)
class LevelFormat(Format):
    """Any short, ascending list of levels; ties go up.

    With levels (-1, 1) this is BinaryDM's sign function with sign(0) = +1.

    Args:
        listed: The levels.
        first: Code of the first; those of the others follow.
    """

    listed: tuple[float, ...]
    first: int = 0

    @property
    def low(self) -> float:
        """The smallest level."""
        return self.listed[0]

    @property
    def high(self) -> float:
        """The largest level."""
        return self.listed[-1]

    @property
    def is_integer(self) -> bool:
        """See `Format.is_integer`."""
        return all(level == int(level) for level in self.listed)

    def encode(self, x: Tensor) -> Tensor:
        """See `Format.encode`."""
        # In float64, where the middle between two float32 levels is exact.
        levels = torch.tensor(self.listed, device=x.device).double()
        middles = (levels[1:] + levels[:-1]) / 2
        return (torch.bucketize(x.double(), middles, right=True) + self.first).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """See `Format.decode`; codes beyond the list stand for the level at its end."""
        index = (codes.int() - self.first).clamp_(0, len(self.listed) - 1)
        return torch.tensor(self.listed, device=codes.device)[index]
