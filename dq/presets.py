"""Formats by short names, as recipes and candidates call them."""

from __future__ import annotations

import re

from dq.errors import DQError, unknown
from dq.formats import IntFormat, formats
from dq.spec import Granularity, TensorSpec

__all__ = [
    "FLOAT",
    "GROUP",
    "WIDEST_GROUPED",
    "input_preset",
    "input_spec",
    "weight_preset",
    "weight_spec",
]

FLOAT = "float"  # the name of a tensor that is not quantized
GROUP = 32  # weights that share a scale where no other number is asked for
WIDEST_GROUPED = 4  # integer codes leave room for a multiplier up to here
_NAME = re.compile(r"(?P<format>\w+?)(-g(?P<group>\d+))?")


def weight_spec(bits: int, group: int, observer: str = "mse") -> TensorSpec:
    """Return the integer weight format of a width.

    Args:
        bits: 2 to 8.
        group: Weights that share a scale; 0 for one scale an output channel. Only widths up to 4
            leave room for a multiplier, so wider ones take no groups.
        observer: How ranges are chosen.
    """
    if group == 0:
        return TensorSpec(f"int{bits}", Granularity("channel"), observer=observer)
    return TensorSpec(
        f"int{bits}", Granularity("group", group), observer=observer, scale_format=f"uint{8 - bits}"
    )


def weight_preset(name: str, observer: str = "mse") -> TensorSpec:
    """Return a weight format by name.

    Args:
        name: A format, and perhaps a group: "int8", "int4-g64", "e2m1", "e4m3-g0" (by channel).
            Formats of up to 4 bits have groups of 32 unless they say otherwise.
        observer: How ranges are chosen.

    Raises:
        DQError: If there is no such format, or it takes no groups.
    """
    found = _NAME.fullmatch(name)
    if found is None or found["format"] not in formats.names():
        raise unknown("weight format", name, formats.names())
    grid = formats[found["format"]]
    group = GROUP if grid.bits <= WIDEST_GROUPED else 0
    if found["group"] is not None:
        group = int(found["group"])
    if not isinstance(grid, IntFormat):
        granularity = Granularity("group", group) if group else Granularity("channel")
        return TensorSpec(grid.name, granularity, observer=observer)
    if not grid.signed:
        raise DQError(f"weights are signed; {name} is not")
    if group and grid.bits > WIDEST_GROUPED:
        raise DQError(f"{name}: {grid.bits}-bit integers take no groups")
    return weight_spec(grid.bits, group, observer)


def input_spec(bits: int, dynamic: bool, observer: str = "mse") -> TensorSpec:
    """Return the integer input format of a width.

    Args:
        bits: 2 to 8.
        dynamic: A scale a token, symmetric, found at run time; else one for all, asymmetric.
        observer: How static ranges are chosen.
    """
    if dynamic:
        return TensorSpec(f"int{bits}", Granularity("token"), dynamic=True)
    return TensorSpec(f"int{bits}", Granularity("tensor"), symmetric=False, observer=observer)


def input_preset(name: str, dynamic: bool, observer: str = "mse") -> TensorSpec:
    """Return an input format by name: "int8", "e4m3", ...

    Args:
        name: A format.
        dynamic: Whether scales are found at run time.
        observer: How static ranges are chosen.

    Raises:
        DQError: If there is no such format.
    """
    grid = formats[name]
    if isinstance(grid, IntFormat):
        return input_spec(grid.bits, dynamic, observer)
    granularity = Granularity("token" if dynamic else "tensor")
    return TensorSpec(name, granularity, dynamic=dynamic, observer=observer)
