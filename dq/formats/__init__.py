"""Number formats: finite grids on the line, with codes.

A *code* is an unsigned integer in `[0, 2**bits)`, held in uint8; a *level* is the number that it
stands for. `formats` holds those that have a name in the field. Beside them it knows every float of
at most 8 bits by the name that says its fields, such as "e3m4", or "ue4m4" without a sign: all of
their codes are finite. Which of them hardware multiplies is said by `TensorSpec.is_deployable`.
"""

from __future__ import annotations

from dq.formats.floating import FloatFormat
from dq.formats.format import Format
from dq.formats.integer import IntFormat
from dq.formats.power import PowerFormat
from dq.formats.table import LevelFormat
from dq.registry import Registry

__all__ = ["FloatFormat", "Format", "IntFormat", "LevelFormat", "PowerFormat", "formats"]

# Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero (QLoRA, Dettmers et al.
# 2023, arXiv 2305.14314, appendix E).
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


class _Formats(Registry[Format]):
    """The registry, which makes floats of other fields when it is asked for them."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or FloatFormat.of(str(name)) is not None

    def __getitem__(self, name: str) -> Format:
        made = None if super().__contains__(name) else FloatFormat.of(name)
        return made or super().__getitem__(name)


formats: Registry[Format] = _Formats("format")

for _bits in range(2, 9):
    formats.add(f"int{_bits}", IntFormat(f"int{_bits}", _bits))
    formats.add(f"uint{_bits}", IntFormat(f"uint{_bits}", _bits, signed=False))
for _name in ("e2m1", "e2m3", "e3m2"):
    _made = FloatFormat.of(_name)
    assert _made is not None  # all three are such names
    formats.add(_name, _made)
for _format in (
    FloatFormat("e4m3", 8, exponent=4, mantissa=3, bias=7, largest=448.0),  # "fn": 480 is NaN
    FloatFormat("e5m2", 8, exponent=5, mantissa=2, bias=15, largest=57344.0),
    PowerFormat("e8m0", 8),
    LevelFormat("binary", 1, listed=(-1.0, 1.0)),
    LevelFormat("ternary", 2, listed=(-1.0, 0.0, 1.0), first=1),  # the codes of int2
    LevelFormat("nf4", 4, listed=_NF4),
):
    formats.add(_format.name, _format)
