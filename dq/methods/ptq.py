"""Plain post-training quantization: one format for all weights, one for all inputs.

Integer weights of 5 to 8 bits have a scale an output channel. Narrower ones have groups with
two-level scales (QServe, Lin et al. 2024, arXiv 2405.04532, section 4.2: a float a channel times an
integer a group), so that `code * multiplier` is an 8-bit integer and W4A8 products stay exact.
Ranges are searched by squared error. Floats and blocks go by the same step; see `dq.methods.fp`.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import NamedTuple

from dq.errors import DQError
from dq.family import (
    SMALLEST,
    WIDE_ROLES,
    Role,
    check_roles,
    check_scaling,
    quantizable,
)
from dq.method import Job, Method, methods
from dq.methods.bos import BOS
from dq.methods.suffix import ROUNDING, SUFFIX, changes, rounding
from dq.nn import describe, matrix_shape
from dq.nn.layers import Layer, input_channels
from dq.plan import LayerSpec, Plan
from dq.presets import FLOAT, input_preset, weight_preset
from dq.recipe import Recipe, Template, templates
from dq.spec import Granularity, TensorSpec

__all__ = ["PTQ"]


_ONE_BIT = (
    "a sign and a scale lose 36 to 50 % of a weight's energy: images are lost without training; "
    "use recipe binarydm-w1a8, which trains, or at least ternary or binary-x2"
)


class _Pair(NamedTuple):
    weight: TensorSpec
    input: TensorSpec | None


class _Decision(NamedTuple):
    spec: LayerSpec | None
    note: str | None


@methods.register("ptq")
@dataclass(frozen=True)
class PTQ(Method):
    """One format for all weights, one for all inputs.

    Args:
        weights: Format of weights, by name; see `dq.presets`.
        inputs: Format of inputs, or "float" to leave them as they are.
        dynamic: Where inputs have their scales from: "static" (calibrated, one a tensor, or one a
            group of channels), "dynamic" (by token or image, at run time), or "auto": what the
            model's family prefers; groups are dynamic then.
        wide: Format of the weights of `wide_roles`, and of layers that the groups of `weights` or
            `inputs` do not fit.
        wide_inputs: Format of the inputs of these layers; empty for that of all.
        wide_roles: Roles that are more fragile than others.
        skip_roles: Roles that stay in floating point.
        smallest: Layers of fewer weights stay in floating point.
        weight_observer: How ranges of weights are chosen.
        input_observer: How ranges of static inputs are chosen.
    """

    weights: str = "int8"
    inputs: str = FLOAT
    dynamic: str = "auto"
    wide: str = "int8"
    wide_inputs: str = ""
    wide_roles: tuple[str, ...] = WIDE_ROLES
    skip_roles: tuple[str, ...] = ()
    smallest: int = SMALLEST
    weight_observer: str = "mse"
    input_observer: str = "mse"

    def __post_init__(self) -> None:
        check_scaling("dynamic", self.dynamic)
        check_roles((*self.wide_roles, *self.skip_roles))
        inputs = [pair.input for pair in self._pairs(dynamic=False)]  # checks the names
        if self.dynamic == "static" and not any(inputs):
            raise DQError("inputs stay in floating point: they have no static scales")

    def decide(self, job: Job) -> Plan:
        """Give every layer the same formats; see `Method.decide`.

        Raises:
            DQError: If the groups fit no layer at all.
        """
        roles = job.family.roles(job.model)
        splits = job.family.splits(job.model)
        dynamic = job.family.is_dynamic(self.dynamic)
        narrow, wide = self._pairs(dynamic)
        layers, notes = {}, {}
        if narrow.weight.is_binary and narrow.weight.bases == 1:
            warnings.warn(f"{self.weights}: {_ONE_BIT}", stacklevel=1)
            notes["1-bit weights"] = _ONE_BIT
        for name, layer in quantizable(job.model).items():
            spec, note = self._decide(roles[name], layer, narrow, wide, splits.get(name, ()))
            if spec is not None:
                layers[name] = spec
            if note is not None:
                notes[name] = f"{describe(name, layer).partition(' ')[2]} {note}"
        misfits = [note for note in notes.values() if "does not divide" in note]
        if misfits and all(spec.weight != narrow.weight for spec in layers.values()):
            raise DQError(f"{self.weights} fits no layer of the model; the first: {misfits[0]}")
        return Plan(job.plan.model, layers, notes)

    def _decide(
        self, role: Role, layer: Layer, narrow: _Pair, wide: _Pair, split: tuple[int, ...]
    ) -> _Decision:
        rows, columns = matrix_shape(layer)
        if role in self.skip_roles:
            return _Decision(None, f"stays float: role {role} is skipped")
        if rows * columns < self.smallest:
            return _Decision(None, f"stays float: {rows * columns} weights are too few")
        note = None
        weight, low = wide if role in self.wide_roles else narrow
        if role not in self.wide_roles:
            try:
                weight.granularity.blocks(rows, columns)
                if low is not None and low.granularity.kind == "group":
                    low.granularity.blocks(1, input_channels(layer))
            except DQError as error:
                weight, low = wide
                note = f"has {weight.code_bits}-bit weights: {error}"
        if low is None:
            return _Decision(LayerSpec(weight), note)
        size = low.granularity.size
        if size and input_channels(layer) % size:
            low = _ungrouped(low)
            note = note or f"has no groups of inputs: {size} does not divide its channels"
        split = split if low.granularity.kind == "tensor" else ()
        return _Decision(LayerSpec(weight, low, split), note)

    def _pairs(self, dynamic: bool) -> tuple[_Pair, _Pair]:
        """Return the formats of most layers, and those of the fragile ones."""
        wide = self._pair(self.wide, self.wide_inputs or self.inputs, dynamic)
        return self._pair(self.weights, self.inputs, dynamic), wide

    def _pair(self, weight: str, low: str, dynamic: bool) -> _Pair:
        spec = None
        if low != FLOAT:
            static_groups = self.dynamic == "static"
            spec = input_preset(low, dynamic, self.input_observer, static_groups)
        return _Pair(weight_preset(weight, self.weight_observer), spec)


def _ungrouped(spec: TensorSpec) -> TensorSpec:
    """Return the same format with a scale a token, or a static one."""
    granularity = Granularity("token" if spec.dynamic else "tensor")
    return TensorSpec(spec.format, granularity, spec.symmetric, spec.dynamic, spec.observer)


def _build(found: re.Match[str]) -> Recipe:
    weights = f"int{found['weight']}" + (f"-g{found['group']}" if found["group"] else "")
    inputs = FLOAT if found["input"] == "16" else f"int{found['input']}"
    ptq = PTQ(weights, inputs, dynamic=found["scales"] or "auto")
    static = inputs != FLOAT and ptq.dynamic != "dynamic"
    kept = (BOS(),) if static else ()
    return Recipe(found[0], (ptq, *changes(found), *kept, *rounding(found, "rtn")))


_NAME_END = r"(-g(?P<group>\d+))?(-(?P<scales>static|dynamic))?" + SUFFIX
_LINES = {
    "w8a8": "8-bit weights and inputs: integer products everywhere",
    "w4a8": "4-bit weights in groups of 32, 8-bit inputs: exact integer products",
    "w6a8": "6-bit weights, 8-bit inputs",
    "w8a16": "8-bit weights, float inputs: memory only",
    "w4a16": "4-bit weights in groups of 32, float inputs: memory only",
}
for _name, _help in _LINES.items():
    _weight, _input = re.findall(r"\d+", _name)
    _pattern = rf"w(?P<weight>{_weight})a(?P<input>{_input}){_NAME_END}"
    templates.add(_name, Template(_pattern, _help, _build))


def _signs(found: re.Match[str]) -> Recipe:
    group = f"-g{found['group']}" if found["group"] else ""
    base, _, bases = found["weight"].partition("-")
    inputs = FLOAT if found["input"] == "16" else "int8"
    ptq = PTQ(f"{base}{group}{'-' if bases else ''}{bases}", inputs)
    kept = () if inputs == FLOAT else (BOS(),)
    return Recipe(found[0], (ptq, *kept, *rounding(found, "gptq")))


for _name, _help in {
    "ternary-a8": "weights of -1, 0 and 1 by GPTQ, 8-bit inputs; -a16 float inputs, -g64 groups",
    "binary-x2-a8": "the same with sums of two scaled signs",
    "binary-a8": "the same with one, which needs training: see binarydm-w1a8",
}.items():
    _pattern = rf"(?P<weight>{_name[:-3]})(-g(?P<group>\d+))?-a(?P<input>8|16){ROUNDING}"
    templates.add(_name, Template(_pattern, _help, _signs))
templates.add(
    "wXaY",
    Template(
        rf"w(?P<weight>[2-8])a(?P<input>[2-8]|16){_NAME_END}",
        "any X of 2 to 8, Y of 2 to 8 or 16; -g64 sets the group, -static or -dynamic the inputs, "
        "-gptq, -adaround or -signround the rounding",
        _build,
    ),
)
