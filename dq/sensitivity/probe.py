"""What a sensitivity is found for, on what, and how the table is made of what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dq.calls import Call
from dq.errors import inside
from dq.nn import QuantConv2d, QuantLinear
from dq.nn.layers import Layer
from dq.quantize import choose_scales
from dq.ranges import InputRange, InputRanges
from dq.scales import Scales
from dq.sensitivity.candidates import Candidates
from dq.sensitivity.table import Row, Table
from dq.sensitivity.trace import Trace
from dq.sensitivity.variants import input_alone, weight_alone

__all__ = ["Noise", "Probe", "fill", "tabulate"]

Noise = dict[str, float]  # by "w:FORMAT" and "a:FORMAT"


@dataclass(frozen=True)
class Probe:
    """What a measurement runs on.

    Attributes:
        model: The denoiser, float.
        calls: Arguments of forward calls, in float32.
        ranges: What calibration knows about the inputs, by input format and layer.
        candidates: The formats.
        weights: Names of the weight formats that are run.
        inputs: Names of the input formats that are run.
        prefix: Whether what came before a layer is remembered; False runs the whole model each
            time, to compare with.
    """

    model: nn.Module
    calls: Sequence[Call]
    ranges: Mapping[str, InputRanges]
    candidates: Candidates
    weights: tuple[str, ...]
    inputs: tuple[str, ...]
    prefix: bool = True
    _scales: dict[tuple[str, str], Scales] = field(default_factory=dict, repr=False, compare=False)

    def layer(self, name: str) -> Layer:
        """Return a candidate layer of the model."""
        layer = self.model.get_submodule(name)
        assert isinstance(layer, (nn.Linear, nn.Conv2d))  # candidates are nothing else
        return layer

    def run_weights(self, layer: str) -> tuple[str, ...]:
        """Return the weight formats to run; where their groups do not fit, the shortest that do."""
        offered = self.candidates.weights[layer]
        fitting = tuple(name for name in self.weights if name in offered)
        return fitting or (min(offered, key=lambda name: offered[name].code_bits),)

    def runs(self, layer: str) -> tuple[str, ...]:
        """Return what is run of a layer: "w:FORMAT" for weights, "a:FORMAT" for inputs."""
        weights = (f"w:{name}" for name in self.run_weights(layer))
        return (*weights, *(f"a:{name}" for name in self.inputs))

    def keys(self, layer: str) -> list[str]:
        """Return all formats of a layer, named as in `runs`."""
        weights = (f"w:{weight}" for weight in self.candidates.weights[layer])
        return [*weights, *(f"a:{input}" for input in self.candidates.inputs)]

    def variant(self, layer: str, key: str) -> QuantLinear | QuantConv2d:
        """Return a layer with one tensor quantized."""
        alone = self.weight_alone if key[0] == "w" else self.input_alone
        return alone(layer, key[2:])

    def weight_alone(self, name: str, weight: str) -> QuantLinear | QuantConv2d:
        """Return a layer with a quantized weight."""
        input = next(iter(self.candidates.inputs), "float")
        spec = self.candidates.spec(name, weight, input)
        assert spec is not None  # no candidate is float
        scales = self.scales(name, weight)
        return weight_alone(self.layer(name), spec, scales, self._known(name, input))

    def scales(self, layer: str, weight: str) -> Scales:
        """Return the scales of a weight in one of its formats; they are chosen once."""
        key = layer, weight
        if key not in self._scales:
            matrix = self.layer(layer).weight.detach().flatten(1)
            with inside(layer):
                self._scales[key] = choose_scales(matrix, self.candidates.weights[layer][weight])
        return self._scales[key]

    def input_alone(self, name: str, input: str) -> QuantLinear | QuantConv2d:
        """Return a layer with a quantized input."""
        spec = self.candidates.spec(name, next(iter(self.candidates.weights[name])), input)
        assert spec is not None  # no candidate is float
        return input_alone(self.layer(name), spec, self._known(name, input))

    def _known(self, layer: str, input: str) -> InputRange | None:
        return self.ranges.get(input, {}).get(layer)


def fill(measured: Noise, estimated: Noise) -> Noise:
    """Return the noise of all formats, from that of some and estimates of all.

    What was measured is taken as it is; other formats keep their estimated ratio to the measured
    one that is nearest.

    Args:
        measured: By format; may be empty.
        estimated: By format, of all; in their order.
    """
    filled = {}
    for name, value in estimated.items():
        if name in measured or not measured:
            filled[name] = measured.get(name, value)
            continue
        near = min(measured, key=lambda other: _apart(estimated[other], value))
        filled[name] = measured[near] * (value / estimated[near] if estimated[near] else 1.0)
    return filled


def _apart(one: float, other: float) -> float:
    low, high = sorted((one, other))
    return high / low if low else float("inf")


def tabulate(
    probe: Probe, seen: Trace, estimated: Mapping[str, Noise], measured: Mapping[str, Noise]
) -> Table:
    """Make the table.

    Args:
        probe: What was asked for.
        seen: One call of the model.
        estimated: Noise by layer and format, of all.
        measured: The same of what was run.
    """
    rows = []
    for name, guess in estimated.items():
        ran = measured.get(name, {})
        of = {kind: fill(_only(ran, kind), _only(guess, kind)) for kind in "wa"}
        role, shape = str(probe.candidates.roles[name]), probe.candidates.shapes[name]
        keys = tuple(key for key in probe.keys(name) if key in ran)
        rows.append(
            Row(
                name, role, shape, seen.inputs[name], seen.macs[name], of["w"], of["a"], keys,
                tuple(guess[key] for key in keys),
            )
        )  # fmt: skip
    sharing = [[n for n in names if n in estimated] for names in seen.sharing]
    first: Any = next(v for v in probe.calls[0].values() if isinstance(v, Tensor) and v.dim() > 1)
    facts = {"calls": len(probe.calls), "rows of a call": len(first), "measured": len(measured)}
    groups = tuple(tuple(group) for group in sharing if len(group) > 1)
    return Table(probe.candidates.model, tuple(rows), groups, facts)


def _only(values: Noise, kind: str) -> Noise:
    return {key[2:]: value for key, value in values.items() if key[0] == kind}
