"""Floating point of a few bits: any split into exponent and mantissa, signed or not."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from dq.formats.format import Format

__all__ = ["FloatFormat"]

_NAME = re.compile(r"(?P<unsigned>u?)e(?P<exponent>[1-7])m(?P<mantissa>[0-6])")
_EXPONENT_FIELD = 0x7F800000  # of float32
_NATIVE = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class FloatFormat(Format):
    """A sign perhaps, `exponent` bits, `mantissa` bits; subnormals; saturating.

    Codes are bit patterns. Values are read as in IEEE 754; the format of the same fields without
    codes for infinity or NaN, as the OCP MX specification 1.0 has them, is made by `of`.

    Args:
        name: How recipes and plans call it.
        bits: Sign, exponent and mantissa together.
        exponent: Width of the exponent field.
        mantissa: Width of the mantissa field.
        bias: Exponent bias. (A bias that is not whole is nothing but an ordinary scale.)
        largest: Largest finite level; formats with codes for infinity or NaN keep them out of it.
        signed: Whether there is a sign; else negative values become 0.
    """

    exponent: int
    mantissa: int
    bias: int
    largest: float
    signed: bool = True

    @classmethod
    def of(cls, name: str) -> FloatFormat | None:
        """Return the format that a name describes, e.g. "e3m4" or, without a sign, "ue4m4".

        All of its codes are finite, its bias is the usual `2**(exponent - 1) - 1`. None if the name
        is no such name, or the format has more than 8 bits.
        """
        found = _NAME.fullmatch(name)
        if found is None:
            return None
        exponent, mantissa, signed = int(found[2]), int(found[3]), not found[1]
        bits = exponent + mantissa + signed
        if not 2 <= bits <= 8:
            return None
        bias = (1 << (exponent - 1)) - 1
        largest = (2 - 2.0**-mantissa) * 2.0 ** ((1 << exponent) - 1 - bias)
        return cls(name, bits, exponent, mantissa, bias, largest, signed)

    @property
    def low(self) -> float:
        """The smallest level."""
        return -self.largest if self.signed else 0.0

    @property
    def high(self) -> float:
        """The largest level."""
        return self.largest

    @property
    def tiny(self) -> float:
        """The smallest level above zero, a subnormal."""
        return 2.0 ** (1 - self.bias - self.mantissa)

    @property
    def top(self) -> int:
        """Code of the largest level."""
        fraction, power = math.frexp(self.largest)
        significand = int(fraction * (2 << self.mantissa))  # with the leading one
        return ((power - 2 + self.bias) << self.mantissa) + significand

    def encode(self, x: Tensor) -> Tensor:
        """See `Format.encode`; rounds half to even, as the OCP MX specification 1.0 asks."""
        native = _NATIVE.get(self.name)
        if native is not None:  # 30 times as fast; what the cast makes of overflow differs
            within = x.float().clamp(-self.largest, self.largest)
            return within.to(native).view(torch.uint8)
        magnitude, step = self._steps(x)
        # A mantissa that rounds up to the next power of two carries into the exponent by itself.
        whole = torch.round(magnitude / step).int()
        power = (step.view(torch.int32) >> 23) - 127 + self.mantissa
        code = (power + (self.bias - 1)) * (1 << self.mantissa) + whole
        if self.signed:
            code += torch.signbit(x).int() << (self.bits - 1)
        return code.to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """See `Format.decode`."""
        native = _NATIVE.get(self.name)
        if native is not None:
            return codes.view(native).float()
        # Graphs take it as a constant of theirs.
        table = _levels if torch.compiler.is_compiling() else _kept_levels
        return table(self, codes.device)[codes.int()]

    def round(self, x: Tensor) -> Tensor:
        """See `Format.round`."""
        if self.name in _NATIVE:
            return super().round(x)
        magnitude, step = self._steps(x)
        rounded = torch.round(magnitude.div_(step)).mul_(step)
        return (torch.copysign(rounded, x) if self.signed else rounded).to(x.dtype)

    def _steps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return magnitudes within the grid, and the distance of the levels around each.

        Distances are powers of two, so that to divide by them is exact.
        """
        magnitude = x.float().abs().clamp_max_(self.largest)
        if not self.signed:
            magnitude = torch.where(x > 0, magnitude, 0.0)
        # The power of two below a number is its exponent field; a logarithm would be off by one
        # just below powers of two.
        below = (magnitude.view(torch.int32) & _EXPONENT_FIELD).view(torch.float32)
        return magnitude, below.clamp_min_(2.0 ** (1 - self.bias)).mul_(2.0**-self.mantissa)


def _levels(grid: FloatFormat, device: torch.device) -> Tensor:
    """Return the level of each code, `(2**bits,)` float32."""
    codes = torch.arange(1 << grid.bits, device=device)
    field = (codes >> grid.mantissa) & ((1 << grid.exponent) - 1)
    fraction = (codes & ((1 << grid.mantissa) - 1)).float()
    significand = fraction + (field > 0) * float(1 << grid.mantissa)
    power = field.clamp_min(1) - grid.bias - grid.mantissa
    magnitude = torch.ldexp(significand, power)
    negative = codes >> (grid.bits - 1) if grid.signed else torch.zeros_like(codes)
    return torch.where(negative > 0, -magnitude, magnitude)


_kept_levels = functools.cache(_levels)
