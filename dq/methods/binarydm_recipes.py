"""Recipes of BinaryDM by name; the method itself is in `dq.methods.binarydm`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from dq.calibrate import CalibrationSpec
from dq.family import Role
from dq.method import Method
from dq.methods.binarydm import BinaryDM
from dq.methods.bos import BOS
from dq.methods.operands import Operands
from dq.methods.ptq import PTQ
from dq.presets import FLOAT
from dq.recipe import Recipe, Template, templates

__all__: list[str] = []

_WIDE = (Role.IO, Role.TIME, Role.MODULATION, Role.CAPTION)
_CALIBRATION = CalibrationSpec(n=128, steps=16)
_VARIANTS: Mapping[str, tuple[str, str]] = {  # of the outer layers, of the inner ones
    "ebb": ("ebb", "xnor"),
    "lmb": ("lmb", "xnor"),
    "xnor": ("xnor", "xnor"),
    "ternary": ("ternary", "ternary"),
    "fdb": ("fdb", "fdb"),
}


def _build(found: re.Match[str]) -> Recipe:
    low = found["input"]
    inputs = FLOAT if low == "16" else f"int{low}"
    ptq = PTQ("int8", inputs, wide_inputs="" if low == "16" else "int8", wide_roles=_WIDE)
    kept: tuple[Method, ...] = () if low == "16" else (BOS(),)
    operands: tuple[Method, ...] = (Operands(),) if low == "4" else ()
    outer, inner = _VARIANTS[found["variant"] or "ebb"]
    learned = BinaryDM(outer, inner, group=int(found["group"] or 0), steps=1000, batch=16)
    return Recipe(found[0], (ptq, *kept, *operands, learned), _CALIBRATION)


for _name, _help in {
    "binarydm-w1a8": "1-bit weights that learn, 8-bit inputs; -lmb, -ternary, -fdb for up to 2 "
    "bits, -g64 for groups",
    "binarydm-w1a16": "the same with float inputs: memory only",
    "binarydm-w1a4": "the same with 4-bit inputs, attention at 8 bits; experimental",
}.items():
    _input = _name.rpartition("a")[2]
    _pattern = (
        rf"binarydm-w1a(?P<input>{_input})(-(?P<variant>{'|'.join(_VARIANTS)}))?"
        r"(-g(?P<group>\d+))?"
    )
    templates.add(_name, Template(_pattern, _help, _build))
