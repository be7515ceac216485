"""Recipes of QuEST by name; the method itself is in `dq.methods.quest`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from dq.calibrate import CalibrationSpec
from dq.family import Role
from dq.method import Method
from dq.methods.adaround import AdaRound
from dq.methods.bos import BOS
from dq.methods.gptq import GPTQ
from dq.methods.hadamard import Hadamard
from dq.methods.operands import Operands
from dq.methods.ptq import PTQ
from dq.methods.quest import PAPER_CRITICAL, QuEST
from dq.methods.step_groups import StepGroups
from dq.methods.temporal import Temporal
from dq.recipe import Recipe, Template, templates

__all__: list[str] = []

_WIDE = (Role.IO, Role.TIME, Role.MODULATION)
_CALIBRATION = CalibrationSpec(n=64, steps=16)
_TREATMENTS: Mapping[str, tuple[Method, ...]] = {
    "keep": (Temporal("keep"),),
    "cache": (Temporal("cache"),),
    "align": (),
}


def _build(found: re.Match[str]) -> Recipe:
    weight, low, asked = found["weight"], found["input"], found.groupdict()
    if low == "4":  # groups of an input have scales of their own, and outliers are spread in them
        ptq = PTQ(f"int{weight}", "int4-g32", wide_inputs="int8", wide_roles=_WIDE)
    else:
        ptq = PTQ(f"int{weight}", f"int{low}", asked["scales"] or "auto", wide_roles=_WIDE)
    spread, operands = ((Hadamard(),), (Operands(),)) if low == "4" else ((), ())
    groups = (StepGroups(int(asked["groups"])),) if asked.get("groups") else ()
    rounded = (GPTQ(),) if int(weight) <= GPTQ.widest else ()
    time = found["time"] or "keep"
    before = (ptq, *_TREATMENTS[time], *spread, *groups, BOS(), *operands, *rounded)
    # Rounding of 4-bit inputs makes the output's loss noisy: the layers' own losses steady it.
    local = 1.0 if low == "4" else 0.0
    learned = QuEST(time=time == "align", local_weight=local)
    return Recipe(found[0], (*before, learned), _CALIBRATION)


def _paper(found: re.Match[str]) -> Recipe:
    ptq = PTQ("int4-g0", "int8", "static", wide_roles=(Role.IO,))
    quest = QuEST(PAPER_CRITICAL, time=True, start="cells", weight_scale_rate=0.0, local_weight=1.0)
    return Recipe(found[0], (ptq, AdaRound(), quest), _CALIBRATION)


_SCALES = r"(-(?P<scales>static|dynamic))?(-s(?P<groups>\d+))?"
_END = rf"(-(?P<time>{'|'.join(_TREATMENTS)}))?"
for _name, _help in {
    "quest-w4a8": "w4a8 with GPTQ, then the weights of the blocks and all scales are finetuned; "
    "-cache or -align the layers of time, -static -s4 for scales in 4 groups of steps",
    "quest-w8a8": "the same of w8a8",
    "quest-w4a4": "the same of w4a4, inputs rotated and in groups of 32, attention at 8 bits; "
    "experimental",
}.items():
    _weight, _input = re.findall(r"\d", _name)[:2]
    # Inputs of 4 bits have scales of their own in every group, found at run time.
    _scales = "" if _input == "4" else _SCALES
    _pattern = rf"quest-w(?P<weight>{_weight})a(?P<input>{_input}){_scales}{_END}"
    templates.add(_name, Template(_pattern, _help, _build))
templates.add(
    "quest-paper",
    Template(
        "quest-paper",
        "in the form of Wang et al. 2024: AdaRound by channel, one static scale an input",
        _paper,
    ),
)
