"""Formats by short names, as recipes and candidates call them.

A name is a format, a size of groups perhaps, and perhaps a rule to find their scales:

| name                              | what it is                                                |
|-----------------------------------|-----------------------------------------------------------|
| "int8", "int4", "int4-g64"        | integers; up to 4 bits with two-level scales for groups   |
| "e4m3", "e2m1", "e3m4", "nf4-g64" | floats and others, by channel or with a float32 a group   |
| "binary", "binary-g128"           | signs, with a scale a channel, or two-level ones          |
| "binary-x2", "binary-g64-x3"      | sums of scaled signs; each basis has its own float32      |
| "ternary", "ternary-g64"          | -1, 0, 1, likewise                                        |
| "mxfp4", "mxfp6", "mxfp8"         | OCP MX blocks of 32; "mxfp6-e3m2", "mxfp8-e5m2"           |
| "nvfp4"                           | blocks of 16 with e4m3 scales                             |
| "nvfp4-four-six", "mxfp4-rceil"   | the same, scales found by a rule of `dq.blocks`           |
"""

from __future__ import annotations

import re
from typing import NamedTuple

from dq.block_formats import BLOCK_FORMATS
from dq.errors import DQError, unknown
from dq.formats import IntFormat, formats
from dq.spec import Granularity, TensorSpec

__all__ = ["FLOAT", "input_preset", "weight_preset"]

FLOAT = "float"  # the name of a tensor that is not quantized
_GROUP = 32  # weights that share a scale where no other number is asked for
_SIGN_MULTIPLIER = "uint6"  # of groups of signs, 1 to 64: 128 would leave int8
_WIDEST_GROUPED = 4  # integer codes leave room for a multiplier up to here
_RULES = ("floor", "ceil", "even", "rceil", "nearest", "four-six", "search")
_NAME = re.compile(
    rf"(?P<name>[a-z0-9]+(-e\dm\d)?)(-g(?P<group>\d+))?(-x(?P<bases>\d))?(-(?P<rule>{'|'.join(_RULES)}))?"
)


# By scale format, for inputs: one that tries nothing.
_RUN_TIME_RULES = {"e4m3": "nearest", "e8m0": "rceil"}


class _Parts(NamedTuple):
    name: str
    group: int | None
    rule: str | None
    bases: int


def _parts(name: str, what: str) -> _Parts:
    found = _NAME.fullmatch(name)
    blocks = BLOCK_FORMATS.get(found["name"]) if found is not None else None
    if found is None or (blocks is None and found["name"] not in formats):
        raise unknown(f"{what} format", name, (*BLOCK_FORMATS, *formats.names()))
    if found["rule"] is not None and blocks is None:
        raise DQError(f"{name}: only {', '.join(BLOCK_FORMATS)} have scales that a rule finds")
    if found["group"] is not None and blocks is not None:
        raise DQError(f"{name}: {found['name']} has blocks of {blocks.size}")
    group = None if found["group"] is None else int(found["group"])
    bases = int(found["bases"] or 1)
    if bases != 1 and found["name"] != "binary":
        raise DQError(f"{name}: only binary adds up bases")
    return _Parts(found["name"], group, found["rule"], bases)


def weight_preset(name: str, observer: str = "mse") -> TensorSpec:
    """Return a weight format by name.

    Args:
        name: See the table above. Integers of up to 4 bits have groups of 32 unless they say
            otherwise; "-g0" is one scale an output channel.
        observer: How ranges are chosen, where scales are float32.

    Raises:
        DQError: If there is no such format, or it takes no groups.
    """
    base, group, rule, bases = _parts(name, "weight")
    if base in BLOCK_FORMATS:
        return _in_blocks(base, rule or "search", dynamic=False)
    grid = formats[base]
    if grid.low >= 0:
        raise DQError(f"weights are signed; {name} is not")
    if not isinstance(grid, IntFormat):
        granularity = Granularity("group", group) if group else Granularity("channel")
        whole = _SIGN_MULTIPLIER if group and grid.is_integer and bases == 1 else "float32"
        return TensorSpec(
            grid.name, granularity, observer=observer, scale_format=whole, bases=bases
        )
    if group and grid.bits > _WIDEST_GROUPED:
        raise DQError(
            f"{name}: {grid.bits}-bit integers take no groups, code times multiplier would leave "
            f"8 bits; drop -g{group}, or use at most {_WIDEST_GROUPED} bits"
        )
    group = (_GROUP if grid.bits <= _WIDEST_GROUPED else 0) if group is None else group
    if group == 0:
        return TensorSpec(base, Granularity("channel"), observer=observer)
    multiplier = f"uint{8 - grid.bits}"
    grouped = Granularity("group", group)
    return TensorSpec(base, grouped, observer=observer, scale_format=multiplier)


def input_preset(
    name: str, dynamic: bool, observer: str = "mse", static_groups: bool = False
) -> TensorSpec:
    """Return an input format by name.

    Args:
        name: See the table above. Blocks always have scales found at run time.
        dynamic: Whether others have: a scale a token, symmetric. Static ones have one for all, and
            integers then a zero point.
        observer: How static ranges are chosen.
        static_groups: Whether groups of channels have static scales, the same for all tokens; else
            they are found at run time. Groups of one are a simulation: nothing multiplies them.

    Raises:
        DQError: If there is no such format.
    """
    base, group, rule, _ = _parts(name, "input")
    if base in BLOCK_FORMATS:
        cheap = _RUN_TIME_RULES[BLOCK_FORMATS[base].scale_format]
        return _in_blocks(base, rule or cheap, dynamic=True)
    granularity = Granularity("group", group) if group else None
    if granularity and not static_groups:
        return TensorSpec(base, granularity, dynamic=True)
    if dynamic and not granularity:
        return TensorSpec(base, Granularity("token"), dynamic=True)
    symmetric = not isinstance(formats[base], IntFormat)
    return TensorSpec(base, granularity or Granularity("tensor"), symmetric, observer=observer)


def _in_blocks(name: str, rule: str, dynamic: bool) -> TensorSpec:
    blocks = BLOCK_FORMATS[name]
    return TensorSpec(
        blocks.format,
        Granularity("group", blocks.size),
        dynamic=dynamic,
        scale_format=blocks.scale_format,
        scale_rule=rule,
    )
