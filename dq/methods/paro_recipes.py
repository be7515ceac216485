"""Recipes of PAROAttention by name; the method itself is in `dq.methods.paro`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dq.calibrate import CalibrationSpec
from dq.methods.paro import PARO
from dq.recipe import Recipe, Template, templates

__all__: list[str] = []

# Masks of four images miss more of what others attend to; sixteen gain little.
_CALIBRATION = CalibrationSpec(n=8, steps=20)


def _build(found: re.Match[str]) -> Recipe:
    orders = found["orders"] or "axes"
    size = int(found["block"] or 64)
    density = int(found["density"] or 100) / 100
    # Without a mask, an order is good for rounding alone.
    judged: dict[str, Any] = {} if found["density"] else {"criterion": "paper", "alpha": 0.0}
    formats: dict[str, Any] = _FORMATS[found["format"]] if found["format"] else {}
    step = PARO(density, (size,), orders, **judged, **formats)
    return Recipe(found[0], (step,), _CALIBRATION)


_FORMATS: Mapping[str, dict[str, Any]] = {
    # Seven bits: products take both operands signed, and probabilities are not.
    "int8": {"query_key": "int8", "value": "int8", "probabilities": "uint7"},
    "fp8": {"query_key": "int8", "value": "e4m3", "probabilities": "e4m3"},
    "int4": {"query_key": "int4", "value": "int4", "probabilities": "uint4"},
}
_FORMAT = rf"-(?P<format>{'|'.join(_FORMATS)})"
_END = r"(-(?P<orders>tiles|natural))?(-b(?P<block>\d+))?"

templates.add(
    "paro-50",
    Template(
        rf"paro-(?P<density>[1-9]\d?)({_FORMAT})?{_END}",
        "half of the attention's blocks, tokens reordered by head; -30, -20; -int8, -fp8, -int4 "
        "for operands of few bits, -tiles for more orders, -b16 for smaller blocks; after a weight "
        "recipe with +",
        _build,
    ),
)
templates.add(
    "paro-int8",
    Template(
        rf"paro(?P<density>){_FORMAT}{_END}",
        "all of the attention's blocks, with operands of 8 bits by block; -fp8, -int4",
        _build,
    ),
)
