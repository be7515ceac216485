"""Powers of two: the scales of the OCP MX formats."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dq.formats.format import Format

__all__ = ["PowerFormat"]

_BIAS = 127


@dataclass(frozen=True)
class PowerFormat(Format):
    """E8M0: `2**(code - 127)`, no sign, no zero; code 255, NaN, is never given."""

    @property
    def low(self) -> float:
        """The smallest level; code 0."""
        return 2.0**-_BIAS

    @property
    def high(self) -> float:
        """The largest level; code 254."""
        return 2.0**_BIAS

    def encode(self, x: Tensor) -> Tensor:
        """See `Format.encode`: the nearest power, half way up; what is not positive gets code 0.

        How a block of numbers gets its power is another matter, see `dq.blocks`.
        """
        fraction, power = torch.frexp(x.double().clamp(self.low, self.high))
        # x = fraction * 2**power with a fraction from 1/2 up: 3/4 lies half way between powers.
        return (power - 1 + (fraction >= 0.75).int() + _BIAS).clamp_(0, 254).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """See `Format.decode`."""
        return torch.ldexp(torch.ones(codes.shape, device=codes.device), codes.int() - _BIAS)
