"""The formats that compete for each layer."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dq.errors import DQError
from dq.family import SMALLEST, Family, Role, quantizable
from dq.nn import matrix_shape
from dq.plan import LayerSpec, Plan
from dq.presets import FLOAT, input_preset, weight_preset
from dq.spec import TensorSpec

__all__ = ["Candidates"]

_FLOAT_BYTES = 2  # of a weight that stays as it is


@dataclass(frozen=True)
class Candidates:
    """What each layer of a model may become; that it stays as it is goes without saying.

    Attributes:
        model: Class name of the denoiser.
        shapes: (N, K) of each layer.
        roles: Role of each layer.
        weights: Formats of weights by layer and name; those whose groups do not fit are missing.
        inputs: Formats of inputs by name; the same for all layers.
        splits: Channel segments of inputs.
        kept_every: See `LayerSpec`; of the layers that see prompts.
    """

    model: str
    shapes: Mapping[str, tuple[int, int]]
    roles: Mapping[str, Role]
    weights: Mapping[str, Mapping[str, TensorSpec]]
    inputs: Mapping[str, TensorSpec]
    splits: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    kept_every: int = 0

    @classmethod
    def of(
        cls,
        model: nn.Module,
        family: Family,
        weights: Sequence[str],
        inputs: Sequence[str],
        dynamic: bool,
        kept_every: int = 0,
        smallest: int = SMALLEST,
    ) -> Candidates:
        """Collect the candidates for a model, which may lie on the meta device.

        Args:
            model: The denoiser.
            family: What is known about it.
            weights: Names of formats, see `dq.presets`.
            inputs: Names of formats.
            dynamic: Whether the scales of inputs are found at run time.
            kept_every: See `LayerSpec`.
            smallest: Layers of fewer weights stay as they are.
        """
        specs = {name: weight_preset(name) for name in weights}
        if not specs:
            raise DQError("no weight format competes: name some, such as int4,int8")
        shapes = {name: matrix_shape(layer) for name, layer in quantizable(model).items()}
        shapes = {name: shape for name, shape in shapes.items() if shape[0] * shape[1] >= smallest}
        return cls(
            type(model).__name__,
            shapes,
            {name: role for name, role in family.roles(model).items() if name in shapes},
            {
                name: {k: spec for k, spec in specs.items() if _fits(spec, shape)}
                for name, shape in shapes.items()
            },
            {name: input_preset(name, dynamic) for name in inputs},
            {} if dynamic else family.splits(model),
            0 if dynamic else kept_every,
        )

    @property
    def weight_count(self) -> int:
        """Number of weights of all layers."""
        return sum(rows * columns for rows, columns in self.shapes.values())

    def options(self, layer: str) -> list[tuple[str, str]]:
        """Return what a layer may become, as names of formats (weight, input); float comes last.

        Nothing multiplies integers with floats: where both compete, only their like meet.
        """
        inputs = (*self.inputs, FLOAT)
        return [
            (weight, input)
            for weight, input in itertools.product(self.weights[layer], inputs)
            if input == FLOAT
            or self.weights[layer][weight].grid.is_integer == self.inputs[input].grid.is_integer
        ] + [(FLOAT, FLOAT)]

    def spec(self, layer: str, weight: str, input: str = FLOAT) -> LayerSpec | None:
        """Return what a layer becomes by the names of two formats; None if it stays as it is.

        Raises:
            DQError: If a float weight is to meet a quantized input: no kernel does that.
        """
        if weight == FLOAT:
            if input != FLOAT:
                raise DQError(f"{layer}: a float weight with {input} inputs gains nothing")
            return None
        if input == FLOAT:
            return LayerSpec(self.weights[layer][weight])
        kept = self.kept_every if self.roles[layer] is Role.CROSS_KV else 0
        split = self.splits.get(layer, ())
        return LayerSpec(self.weights[layer][weight], self.inputs[input], split, kept)

    def bytes(self, layer: str, weight: str, input: str = FLOAT) -> int:
        """Return what a layer takes beside its bias."""
        rows, columns = self.shapes[layer]
        spec = self.spec(layer, weight, input)
        return _FLOAT_BYTES * rows * columns if spec is None else spec.bytes(rows, columns)

    def plan(self, choice: Mapping[str, tuple[str, str]]) -> Plan:
        """Return the plan of a choice of (weight, input) by layer."""
        specs = {layer: self.spec(layer, *names) for layer, names in choice.items()}
        return Plan(self.model, {layer: spec for layer, spec in specs.items() if spec is not None})

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values that tell candidates apart."""
        weights = {k: s.to_dict() for table in self.weights.values() for k, s in table.items()}
        inputs = {k: s.to_dict() for k, s in self.inputs.items()}
        return {
            "weights": weights,
            "inputs": inputs,
            "layers": list(self.shapes),
            "kept_every": self.kept_every,
        }

    def input_plans(self) -> dict[str, Plan]:
        """Return for each input format a plan that gives it to every layer, to observe ranges.

        Raises:
            DQError: If no weight format fits a layer.
        """
        for name, shape in self.shapes.items():
            if self.inputs and not self.weights[name]:
                raise DQError(
                    f"no weight format fits layer {name} of {shape[1]} columns, which groups do "
                    "not divide; let one without groups compete, such as int8"
                )
        return {
            name: self.plan(
                {layer: (next(iter(self.weights[layer])), name) for layer in self.shapes}
            )
            for name in self.inputs
        }


def _fits(spec: TensorSpec, shape: tuple[int, int]) -> bool:
    try:
        spec.granularity.blocks(*shape)
    except DQError:
        return False
    return True
