"""Recipes of floating-point formats: FP8, FP4, OCP MX and NVFP4.

All are the step `ptq` with other formats (see `dq.presets`). Weights of 4 bits are then rounded by
GPTQ, which wants calibration data; "-rtn" rounds to nearest and needs none, "-adaround" learns the
rounding as Chen et al. 2024 (arXiv 2408.06995) do.

Scales of inputs are found at run time, unless "-static" asks for calibrated ones: one a token costs
little beside a product. Layers that blocks do not fit, and the first, the last and those of time,
have 8 bits.
"""

from __future__ import annotations

import re

from dq.methods.bos import BOS
from dq.methods.ptq import PTQ
from dq.methods.suffix import SUFFIX, changes, rounding
from dq.presets import FLOAT
from dq.recipe import Recipe, Template, templates

__all__: list[str] = []

_WIDE = "e4m3"
_STATIC = r"(-(?P<static>static))?"
_INPUTS = {"a8": _WIDE, "a16": FLOAT}
# Name, weights, inputs, and how weights are rounded unless the name says so.
_RECIPES = (
    ("fp8", rf"fp8{_STATIC}", "e4m3", "e4m3", "rtn"),
    ("fp8-w8a16", r"fp8-w8a16", "e4m3", FLOAT, "rtn"),
    ("fp4-w4a8", rf"fp4-w4(?P<inputs>a8|a16)(-g(?P<group>\d+))?{_STATIC}", "e2m1", "e4m3", "gptq"),
    ("nvfp4", r"nvfp4(-(?P<inputs>a8|a16))?", "nvfp4", "nvfp4", "gptq"),
    ("mxfp4", r"mxfp4(-(?P<inputs>a8|a16))?", "mxfp4", "mxfp4", "gptq"),
    ("mxfp6", r"mxfp6(-(?P<inputs>a8|a16))?", "mxfp6", "mxfp6", "rtn"),
    ("mxfp8", r"mxfp8(-(?P<inputs>a16))?", "mxfp8", "mxfp8", "rtn"),
)
_HELP = {
    "fp8": "e4m3 weights and inputs, no data needed: fp8 products where the card has them",
    "fp8-w8a16": "e4m3 weights, float inputs: memory only",
    "fp4-w4a8": "e2m1 weights by channel, e4m3 inputs (Chen et al. 2024); -g32 sets a group",
    "nvfp4": "e2m1 weights and inputs, blocks of 16 with e4m3 scales; -a8 e4m3, -a16 float inputs",
    "mxfp4": "OCP MX: e2m1 in blocks of 32 with scales of powers of two; -a8, -a16 likewise",
    "mxfp6": "the same with e2m3",
    "mxfp8": "the same with e4m3",
}


def _template(name: str, pattern: str, weights: str, inputs: str, default: str) -> Template:
    def build(found: re.Match[str]) -> Recipe:
        parts = found.groupdict()
        low = _INPUTS[parts["inputs"]] if parts.get("inputs") else inputs
        group = f"-g{parts['group']}" if parts.get("group") else ""
        static = parts.get("static")
        step = PTQ(
            weights + group,
            low,
            static or ("auto" if low == FLOAT else "dynamic"),
            wide=_WIDE,
            wide_inputs=FLOAT if low == FLOAT else _WIDE,
            # Where e4m3 ends decides little: to search for the best end would be in vain.
            weight_observer="absmax" if weights == _WIDE else "mse",
        )
        kept = (BOS(),) if static else ()
        return Recipe(found[0], (step, *changes(found), *kept, *rounding(found, default)))

    return Template(pattern + SUFFIX, _HELP[name], build)


for _name, *_rest in _RECIPES:
    templates.add(_name, _template(_name, *_rest))
