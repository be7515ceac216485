"""Number formats: finite grids on the line, with codes.

A *code* is an unsigned integer in `[0, 2**bits)`, held in uint8; a *level* is the number that it
stands for. Integers are coded with an offset (code 0 is the lowest level), floats by their bit
pattern. With offset codes an 8-bit signed tensor is at once what u8 x s8 matrix kernels take:
level = code - 128.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dq.registry import Registry

__all__ = ["FloatFormat", "Format", "IntFormat", "LevelFormat", "formats"]

formats: Registry[Format] = Registry("format")


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
    def is_integer(self) -> bool:
        """Whether levels are consecutive integers, so that products can be summed in integers."""
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


@dataclass(frozen=True)
class FloatFormat(Format):
    """Sign, `exponent` bits, `mantissa` bits; subnormals; saturating.

    Args:
        name: How recipes and plans call it.
        bits: `1 + exponent + mantissa`.
        exponent: Width of the exponent field.
        mantissa: Width of the mantissa field.
        bias: Exponent bias.
        largest: Largest finite level; formats with codes for infinity or NaN keep them out of it.
    """

    exponent: int
    mantissa: int
    bias: int
    largest: float

    @property
    def low(self) -> float:
        """The smallest level."""
        return -self.largest

    @property
    def high(self) -> float:
        """The largest level."""
        return self.largest

    def encode(self, x: Tensor) -> Tensor:
        """See `Format.encode`; rounds half to even, as the OCP MX specification 1.0 asks."""
        magnitude = x.abs().float().clamp_max_(self.largest)
        # frexp reads the exponent field: log2 would be off by one just below powers of two.
        lowest = 1 - self.bias
        power = (torch.frexp(magnitude).exponent - 1).clamp_min_(lowest)
        power = torch.where(magnitude > 0, power, lowest)  # the exponent of zero says nothing
        steps = torch.round(torch.ldexp(magnitude, self.mantissa - power)).int()
        # A mantissa that rounds up to the next power of two carries into the exponent by itself.
        code = (power + (self.bias - 1)) * (1 << self.mantissa) + steps
        return (code + (torch.signbit(x).int() << (self.bits - 1))).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """See `Format.decode`."""
        return self._table.to(codes.device)[codes.int()]

    @cached_property
    def _table(self) -> Tensor:
        codes = torch.arange(1 << self.bits)
        field = (codes >> self.mantissa) & ((1 << self.exponent) - 1)
        fraction = (codes & ((1 << self.mantissa) - 1)).float()
        significand = fraction + (field > 0) * float(1 << self.mantissa)
        power = field.clamp_min(1) - self.bias - self.mantissa
        sign = 1.0 - 2.0 * (codes >> (self.bits - 1)).float()
        return sign * torch.ldexp(significand, power)


@dataclass(frozen=True)
class LevelFormat(Format):
    """Any short, ascending list of levels; code = position in the list, ties go up.

    With levels (-1, 1) this is BinaryDM's sign function with sign(0) = +1.
    """

    levels: tuple[float, ...]

    @property
    def low(self) -> float:
        """The smallest level."""
        return self.levels[0]

    @property
    def high(self) -> float:
        """The largest level."""
        return self.levels[-1]

    def encode(self, x: Tensor) -> Tensor:
        """See `Format.encode`."""
        levels = torch.tensor(self.levels, device=x.device)
        middles = (levels[1:] + levels[:-1]) / 2
        return torch.bucketize(x.float(), middles, right=True).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """See `Format.decode`."""
        return torch.tensor(self.levels, device=codes.device)[codes.int()]


for _bits in range(2, 9):
    formats.add(f"int{_bits}", IntFormat(f"int{_bits}", _bits))
    formats.add(f"uint{_bits}", IntFormat(f"uint{_bits}", _bits, signed=False))
for _format in (
    FloatFormat("e4m3", 8, exponent=4, mantissa=3, bias=7, largest=448.0),
    FloatFormat("e5m2", 8, exponent=5, mantissa=2, bias=15, largest=57344.0),
    FloatFormat("e2m3", 6, exponent=2, mantissa=3, bias=1, largest=7.5),
    FloatFormat("e3m2", 6, exponent=3, mantissa=2, bias=3, largest=28.0),
    FloatFormat("e2m1", 4, exponent=2, mantissa=1, bias=1, largest=6.0),
    LevelFormat("binary", 1, levels=(-1.0, 1.0)),
    LevelFormat("ternary", 2, levels=(-1.0, 0.0, 1.0)),
):
    formats.add(_format.name, _format)
