"""Integers, coded with an offset: code 0 is the lowest level.

With offset codes an 8-bit signed tensor is at once what u8 x s8 matrix kernels take:
level = code - 128.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dq.formats.format import Format

__all__ = ["IntFormat"]


@dataclass(frozen=True)
class IntFormat(Format):
    """Consecutive integers: `[-2**(bits-1), 2**(bits-1) - 1]`, unsigned `[0, 2**bits - 1]`."""

    signed: bool = True

    @property
    def low(self) -> int:
        """The smallest level; code 0."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        """The largest level; code `2**bits - 1`."""
        return self.low + (1 << self.bits) - 1

    @property
    def is_integer(self) -> bool:
        """Always true."""
        return True

    def encode(self, x: Tensor) -> Tensor:
        """See `Format.encode`; ties go to the even integer."""
        return (torch.round(x).clamp_(self.low, self.high) - self.low).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """See `Format.decode`."""
        return codes.float() + self.low

    def round(self, x: Tensor) -> Tensor:
        """See `Format.round`."""
        return torch.round(x).clamp_(self.low, self.high)
