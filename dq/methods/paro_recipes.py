"""Recipes of PAROAttention by name; the method itself is in `dq.methods.paro`."""

from __future__ import annotations

import re

from dq.calibrate import CalibrationSpec
from dq.methods.paro import PARO
from dq.recipe import Recipe, Template, templates

__all__: list[str] = []

_CALIBRATION = CalibrationSpec(n=4, steps=20)  # maps of a head differ little between prompts


def _build(found: re.Match[str]) -> Recipe:
    orders = found["orders"] or "axes"
    size = int(found["block"] or 64)
    step = PARO(int(found["density"]) / 100, (size,), orders)
    return Recipe(found[0], (step,), _CALIBRATION)


templates.add(
    "paro-50",
    Template(
        r"paro-(?P<density>[1-9]\d?|100)(-(?P<orders>tiles|natural))?(-b(?P<block>\d+))?",
        "half of the attention's blocks, tokens reordered by head; -30, -20; -tiles for more "
        "orders, -b16 for smaller blocks; after a weight recipe with +",
        _build,
    ),
)
