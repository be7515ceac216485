"""Plain post-training quantization: one integer format for all weights, one for all inputs.

Weights of 5 to 8 bits have a scale an output channel. Narrower ones have groups with two-level
scales (QServe, Lin et al. 2024, arXiv 2405.04532, section 4.2: a float a channel times an integer a
group), so that `code * multiplier` is an 8-bit integer and W4A8 products stay exact. Ranges are
searched by squared error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from dq.errors import DQError, unknown
from dq.family import SMALLEST, WIDE_ROLES, Role, check_scaling, quantizable
from dq.method import Job, Method, methods
from dq.methods.bos import BOS
from dq.nn import describe, matrix_shape
from dq.plan import LayerSpec, Plan
from dq.presets import GROUP, WIDEST_GROUPED, input_spec, weight_spec
from dq.recipe import Recipe, Template, templates
from dq.spec import TensorSpec

__all__ = ["PTQ"]

_FLOAT = 16  # "bits" of a tensor that stays floating point
_SAFE_BITS = 8  # of layers that the recipe's width does not fit


class _Decision(NamedTuple):
    spec: LayerSpec | None
    note: str | None


@methods.register("ptq")
@dataclass(frozen=True)
class PTQ(Method):
    """Round to nearest, everywhere.

    Args:
        weight_bits: 2 to 8.
        input_bits: 2 to 8, or 16 to leave inputs in floating point.
        group: Weights that share a scale; 0 for one scale an output channel. Only widths up to 4
            bits leave room for groups; None gives them 32, and others none.
        inputs: "static" (calibrated, one asymmetric scale a tensor), "dynamic" (by token or image,
            at run time), or "auto": what the model's family prefers.
        wide_roles: Roles whose weights have 8 bits whatever `weight_bits` says.
        skip_roles: Roles that stay in floating point.
        smallest: Layers of fewer weights stay in floating point.
        weight_observer: How ranges of weights are chosen.
        input_observer: How ranges of static inputs are chosen.
    """

    weight_bits: int = 8
    input_bits: int = 16
    group: int | None = None
    inputs: str = "auto"
    wide_roles: tuple[str, ...] = WIDE_ROLES
    skip_roles: tuple[str, ...] = ()
    smallest: int = SMALLEST
    weight_observer: str = "mse"
    input_observer: str = "mse"

    def __post_init__(self) -> None:
        if not 2 <= self.weight_bits <= 8:
            raise DQError(f"weight_bits is 2 to 8, not {self.weight_bits}")
        if self.input_bits != _FLOAT and not 2 <= self.input_bits <= 8:
            raise DQError(f"input_bits is 2 to 8, or 16 for floating point, not {self.input_bits}")
        if self.group is not None and self.group < 0:
            raise DQError(f"group is a number of weights, or 0 for none, not {self.group}")
        if self.group and self.weight_bits > WIDEST_GROUPED:
            raise DQError(
                f"{self.weight_bits}-bit weights take no groups: code times multiplier would leave "
                f"8 bits; drop group {self.group}, or use at most {WIDEST_GROUPED} bits"
            )
        check_scaling("inputs", self.inputs)
        for role in (*self.wide_roles, *self.skip_roles):
            if role not in tuple(Role):
                raise unknown("role", role, tuple(Role))

    def decide(self, job: Job) -> Plan:
        """Give every layer the same formats; see `Method.decide`.

        Raises:
            DQError: If the group fits no layer at all.
        """
        roles = job.family.roles(job.model)
        splits = job.family.splits(job.model)
        dynamic = job.family.is_dynamic(self.inputs)
        layers, notes = {}, {}
        for name, layer in quantizable(job.model).items():
            shape = matrix_shape(layer)
            spec, note = self._decide(roles[name], shape, dynamic, splits.get(name, ()))
            if spec is not None:
                layers[name] = spec
            if note is not None:
                notes[name] = f"{describe(name, layer).partition(' ')[2]} {note}"
        self._check_fit(layers, notes)
        return Plan(job.plan.model, layers, notes)

    def _decide(
        self, role: Role, shape: tuple[int, int], dynamic: bool, split: tuple[int, ...]
    ) -> _Decision:
        if role in self.skip_roles:
            return _Decision(None, f"stays float: role {role} is skipped")
        if shape[0] * shape[1] < self.smallest:
            return _Decision(None, f"stays float: {shape[0] * shape[1]} weights are too few")
        note = None
        spec = self._weight(self.weight_bits)
        if role in self.wide_roles:
            spec = self._weight(_SAFE_BITS)
        else:
            try:
                spec.granularity.blocks(*shape)
            except DQError as error:
                spec, note = self._weight(_SAFE_BITS), f"has 8-bit weights: {error}"
        if self.input_bits == _FLOAT:
            return _Decision(LayerSpec(spec), note)
        return _Decision(LayerSpec(spec, self._input(dynamic), () if dynamic else split), note)

    def _weight(self, bits: int) -> TensorSpec:
        group = GROUP if self.group is None else self.group
        return weight_spec(bits, group if bits <= WIDEST_GROUPED else 0, self.weight_observer)

    def _input(self, dynamic: bool) -> TensorSpec:
        return input_spec(self.input_bits, dynamic, self.input_observer)

    def _check_fit(self, layers: dict[str, LayerSpec], notes: dict[str, str]) -> None:
        narrow = self._weight(self.weight_bits)
        misfits = [note for note in notes.values() if "does not divide" in note]
        if misfits and all(spec.weight != narrow for spec in layers.values()):
            raise DQError(f"group {self.group} fits no layer of the model; the first: {misfits[0]}")


def _build(found: re.Match[str]) -> Recipe:
    settings: dict[str, int | str] = {
        "weight_bits": int(found["weight"]),
        "input_bits": int(found["input"]),
    }
    if found["group"]:
        settings["group"] = int(found["group"])
    if found["inputs"]:
        settings["inputs"] = found["inputs"]
    ptq = PTQ(**settings)  # type: ignore[arg-type]
    static = ptq.input_bits != _FLOAT and ptq.inputs != "dynamic"
    return Recipe(found[0], (ptq, BOS()) if static else (ptq,))


_SUFFIX = r"(-g(?P<group>\d+))?(-(?P<inputs>static|dynamic))?"
_LINES = {
    "w8a8": "8-bit weights and inputs: integer products everywhere",
    "w4a8": "4-bit weights in groups of 32, 8-bit inputs: exact integer products",
    "w6a8": "6-bit weights, 8-bit inputs",
    "w8a16": "8-bit weights, float inputs: memory only",
    "w4a16": "4-bit weights in groups of 32, float inputs: memory only",
}
for _name, _help in _LINES.items():
    _weight, _input = re.findall(r"\d+", _name)
    _pattern = rf"w(?P<weight>{_weight})a(?P<input>{_input}){_SUFFIX}"
    templates.add(_name, Template(_pattern, _help, _build))
templates.add(
    "wXaY",
    Template(
        rf"w(?P<weight>[2-8])a(?P<input>[2-8]|16){_SUFFIX}",
        "any X of 2 to 8, Y of 2 to 8 or 16; -g64 sets the group, -static or -dynamic the inputs",
        _build,
    ),
)
