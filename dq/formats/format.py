"""What a number format is: a finite grid on the line, with codes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from math import frexp

import torch
from torch import Tensor

__all__ = ["Format"]


@dataclass(frozen=True)
class Format(ABC):
    """A finite grid of levels.

    Args:
        name: How recipes and plans call it.
        bits: Width of a code, 1 to 8.
    """

    name: str
    bits: int

    @property
    @abstractmethod
    def low(self) -> float:
        """The smallest level."""

    @property
    @abstractmethod
    def high(self) -> float:
        """The largest level."""

    @property
    def emax(self) -> int:
        """Exponent of the power of two at or below the largest level."""
        return frexp(self.high)[1] - 1

    @property
    def is_integer(self) -> bool:
        """Whether levels are whole numbers, so that products can be summed in integers."""
        return False

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Return the code of the level nearest to each element.

        Args:
            x: Finite values, any shape, floating point. Values beyond the grid saturate, ties go to
                the even code.

        Returns:
            uint8 codes of the same shape.
        """

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Return the float32 levels of uint8 `codes`."""

    def round(self, x: Tensor) -> Tensor:
        """Return the level nearest to each element, in the dtype of `x`."""
        return self.decode(self.encode(x)).to(x.dtype)

    def contains(self, other: Format) -> bool:
        """Return whether every level of another format is one of this."""
        return bool(torch.isin(other.levels, self.levels).all())

    def around(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two levels that each element lies between, float32.

        The first is at most the element and the second at least; both are the element itself where
        it is a level, and the nearest level where it lies beyond the grid.
        """
        levels = self.levels.to(x.device)
        above = torch.searchsorted(levels, x.float()).clamp_max_(len(levels) - 1)
        below = (torch.searchsorted(levels, x.float(), right=True) - 1).clamp_min_(0)
        return levels[below], levels[above]

    @cached_property
    def levels(self) -> Tensor:
        """All levels that `encode` can give, ascending, float32; -0 counts as 0."""
        levels = self.decode(torch.arange(1 << self.bits).to(torch.uint8))
        return levels[(levels >= self.low) & (levels <= self.high)].unique()
