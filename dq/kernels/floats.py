"""Floats of at most 8 bits as kernels need them: by name, as tables.

`dq.formats` says the same in arithmetic, but lies above the kernels; tests hold the two together.
Names are those of `dq.formats`: "e2m1", or "ue4m2" without a sign. A level that e4m3 has too can be
multiplied as e4m3, whatever the format that it came from.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Fields", "as_e4m3", "decode", "encode", "fields"]

_NAME = re.compile(r"(u?)e([1-7])m([0-6])")
_E4M3 = "e4m3"  # the one with codes that are no numbers; torch has it as a dtype


@dataclass(frozen=True)
class Fields:
    """A format, taken apart.

    Attributes:
        exponent: Width of the exponent field.
        mantissa: Width of the mantissa field.
        signed: Whether there is a sign, the highest bit.
        codes: Number of magnitudes, from 0 up; the highest of e4m3 would be NaN.
    """

    exponent: int
    mantissa: int
    signed: bool
    codes: int

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.exponent + self.mantissa + self.signed

    @property
    def high(self) -> float:
        """The largest level."""
        return self.magnitude(self.codes - 1)

    @property
    def emax(self) -> int:
        """Exponent of the power of two at or below the largest level."""
        return math.frexp(self.high)[1] - 1

    def magnitude(self, code: int) -> float:
        """Return the level of a code without its sign."""
        field, fraction = code >> self.mantissa, code & ((1 << self.mantissa) - 1)
        whole = fraction + (1 << self.mantissa if field else 0)
        bias = (1 << (self.exponent - 1)) - 1
        return math.ldexp(whole, max(field, 1) - bias - self.mantissa)


def fields(name: str) -> Fields:
    """Take a format apart."""
    found = _NAME.fullmatch(name)
    assert found is not None, name  # callers have asked whether it is a float
    exponent, mantissa = int(found[2]), int(found[3])
    codes = (1 << (exponent + mantissa)) - (name == _E4M3)
    return Fields(exponent, mantissa, not found[1], codes)


def _built(name: str, what: str, device: torch.device) -> Tensor:
    f = fields(name)
    levels = torch.tensor([f.magnitude(code) for code in range(f.codes)], device=device)
    if what == "middles":
        middles = (levels[1:] + levels[:-1]) / 2  # exact
        # A tie goes to the even mantissa: up from an odd code, which a middle just below says.
        # Without a mantissa both ends are powers of two, and it goes up, but from 0.
        up = middles[1 :: 2 if f.mantissa else 1]
        up.copy_(torch.nextafter(up, torch.zeros_like(up)))
        return middles
    if f.signed:
        levels = torch.cat([levels, -levels])
    return levels if what == "levels" else levels.to(torch.float8_e4m3fn).view(torch.uint8)


@functools.cache
def _kept(name: str, what: str, device: torch.device) -> Tensor:
    return _built(name, what, device)


def _table(name: str, what: str, device: torch.device) -> Tensor:
    """Return what is known of a format, on a device.

    Args:
        name: Of the format.
        what: "levels", float32 by code; "e4m3", the same as bytes of e4m3; "middles", float32, the
            largest number that is rounded down, by code, without the sign.
        device: Of the table.
    """
    # Graphs take it as a constant of theirs.
    make = _built if torch.compiler.is_compiling() else _kept
    return make(name, what, device)


def as_e4m3(codes: Tensor, name: str) -> Tensor:
    """Return the levels of uint8 codes of a format whose levels are e4m3 ones, float8_e4m3fn."""
    if name != _E4M3:
        codes = _table(name, "e4m3", codes.device)[codes.int()]
    return codes.view(torch.float8_e4m3fn)


def decode(codes: Tensor, name: str) -> Tensor:
    """Return the float32 levels of uint8 codes."""
    if name == _E4M3:
        return codes.view(torch.float8_e4m3fn).float()
    return _table(name, "levels", codes.device)[codes.int()]


def encode(x: Tensor, name: str) -> Tensor:
    """Return the uint8 codes of the levels nearest to float32 `x`; ties to even, saturating."""
    f = fields(name)
    if name == _E4M3:  # clamped, since what becomes of overflow differs by version
        return x.clamp(-f.high, f.high).to(torch.float8_e4m3fn).view(torch.uint8)
    magnitude = x.abs() if f.signed else x.clamp_min(0)
    middles = _table(name, "middles", x.device)
    codes = torch.bucketize(magnitude, middles, out_int32=True).to(torch.uint8)
    return codes | (torch.signbit(x).to(torch.uint8) << (f.bits - 1)) if f.signed else codes
