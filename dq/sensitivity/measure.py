"""Quantize one tensor of one layer at a time, and see what that does to the output.

What came before the layer is remembered, see `dq.sensitivity.prefix`.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from dq.calls import Call
from dq.nn.swap import exchanged
from dq.sensitivity.prefix import Prefix, stages
from dq.sensitivity.probe import Noise, Probe
from dq.sensitivity.shares import shared
from dq.sensitivity.trace import Trace
from dq.work import Work

__all__ = ["measure"]

logger = logging.getLogger("dq")

_UNIT = 24  # layers that share one recorded run of each call


@torch.no_grad()
def measure(probe: Probe, layers: Sequence[str], seen: Trace, work: Work) -> dict[str, Noise]:
    """Run the model with one tensor of one layer quantized, for the formats that the probe names.

    Args:
        probe: What to measure, and on what.
        layers: Those to measure, in the order in which they run.
        seen: One call of the model.
        work: Where finished layers are kept.

    Returns:
        Relative noise power of the output, by layer and format.
    """
    units = [layers[i : i + _UNIT] for i in range(0, len(layers), _UNIT)]
    parts = shared(
        work, "unit", len(units), lambda i: _Unit(probe, units[i], seen, layers).run(), "measuring"
    )
    found: dict[str, Noise] = {name: {} for name in layers}
    for key, value in ((k, v) for part in parts for k, v in part.items()):
        name, _, format = key.partition("|")
        found[name][format] = float(value)
    return found


class _Unit:
    """Some neighbouring layers: each call is recorded once for all of them."""

    def __init__(
        self, probe: Probe, layers: Sequence[str], seen: Trace, all_layers: Sequence[str]
    ) -> None:
        self.probe = probe
        self.layers = layers
        found = stages(probe.model, seen.ran)
        near = [s for s in found if any(n == s or n.startswith(f"{s}.") for n in layers)]
        inside = {n for n in seen.ran for s in near if n.startswith(f"{s}.")}
        self.watched = [*found, *sorted(inside)] if probe.prefix else list(layers)
        self.trials = {name: list(self._trials(name, seen, all_layers)) for name in layers}
        self.remember: bool | None = None  # to be tried out

    def _trials(
        self, name: str, seen: Trace, layers: Sequence[str]
    ) -> Iterator[tuple[str, dict[str, nn.Module]]]:
        """Yield what is run of a layer, and which layers are exchanged for it.

        An input that several layers share is one tensor: it is quantized for all of them, when the
        first of them begins.
        """
        shared_by = next((group for group in seen.sharing if name in group), (name,))
        group = [other for other in shared_by if other in layers]
        for key in self.probe.runs(name):
            members = [name] if key[0] == "w" else group
            if members[0] == name:
                yield key, {member: self.probe.variant(member, key) for member in members}

    def run(self) -> dict[str, Tensor]:
        """Return the relative noise of everything that is run, as "layer|format"."""
        power = 0.0
        found: dict[str, float] = defaultdict(float)
        for call in self.probe.calls:
            prefix = Prefix(self.probe.model, self.watched)
            reference = prefix.record(call)
            power += _square(reference)
            if self.remember is None:
                self.remember = self._repeats(prefix, call)
            with prefix.remembered() if self.remember else nullcontext():
                for name in self.layers:
                    for key, variants in self.trials[name]:
                        with exchanged(self.probe.model, variants):
                            y = prefix.rerun(call, name)
                        part = _square(y - reference) / len(variants)
                        for member in variants:
                            found[f"{member}|{key}"] += part
        return {k: torch.tensor(v / power, dtype=torch.float64) for k, v in found.items()}

    def _repeats(self, prefix: Prefix, call: Call) -> bool:
        """Whether what is remembered can be relied on."""
        if not self.probe.prefix:
            return False
        ends = (self.layers[0], self.layers[-1])  # the second sees what the first has left
        repeats = prefix.repeats(call, ends)
        if not repeats:
            logger.warning("the model does not repeat itself: it is run whole each time")
        return repeats


def _square(x: Tensor) -> float:
    return float(x.double().square().sum())
