"""Quantize one tensor of one layer at a time, and see what that does to the output.

What came before the layer is remembered, see `dq.sensitivity.prefix`. Some formats are run; for the
others the noise is scaled by the squared error that they make at the output of the layer itself,
which costs one layer instead of a model. Of integers with one scale that is the rule that a bit
less makes four times the noise; it also holds between formats whose groups or grids differ.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from dq.errors import DQError
from dq.nn.swap import replace
from dq.progress import track
from dq.sensitivity.prefix import Prefix, stages
from dq.sensitivity.probe import Probe, as_float32, tabulate
from dq.sensitivity.table import Table
from dq.sensitivity.trace import Trace, trace
from dq.work import Work

__all__ = ["measure"]

logger = logging.getLogger("dq")

_UNIT = 24  # layers that share one recorded run of each call


@torch.no_grad()
def measure(probe: Probe, work: Work) -> Table:
    """Measure every candidate layer.

    Under `accelerate launch` each process takes its share of the layers.

    Args:
        probe: What to measure, and on what.
        work: Where finished layers are kept; shared by all processes.

    Returns:
        The table; the same whatever the number of processes.
    """
    with as_float32(probe.model):
        seen = trace(probe.model, probe.calls[0])
        layers = [name for name in seen.order if name in probe.candidates.shapes]
        units = [layers[i : i + _UNIT] for i in range(0, len(layers), _UNIT)]
        state = PartialState()
        done: dict[int, dict[str, Tensor]] = {}
        mine = range(len(units))[state.process_index :: state.num_processes]
        for index in track(mine, "measuring layers"):
            stage = f"unit-{index:04}"
            known = work.load(stage)
            done[index] = known if known is not None else _Unit(probe, units[index], seen).run()
            if known is None:
                work.save(stage, done[index])
    state.wait_for_everyone()
    stored: dict[str, Tensor] = {}
    for index in range(len(units)):
        part = done.get(index) or work.load(f"unit-{index:04}")
        if part is None:
            raise DQError(
                "layers that another process has measured are missing: all processes must share "
                "the cache folder, see XDG_CACHE_HOME"
            )
        stored |= part
    found: dict[str, tuple[dict[str, float], dict[str, float]]] = {n: ({}, {}) for n in layers}
    for key, value in stored.items():
        name, kind, format = key.split("|")
        found[name][kind == "error"][format] = float(value)
    return tabulate(probe, seen, found, "measured")


class _Unit:
    """Some neighbouring layers: each call is recorded once for all of them."""

    def __init__(self, probe: Probe, layers: Sequence[str], seen: Trace) -> None:
        self.probe = probe
        self.layers = layers
        found = stages(probe.model, seen.ran)
        near = [s for s in found if any(n == s or n.startswith(f"{s}.") for n in layers)]
        inside = {n for n in seen.ran for s in near if n.startswith(f"{s}.")}
        self.watched = [*found, *sorted(inside)] if probe.prefix else list(layers)
        self.variants = {name: probe.variants(name) for name in layers}
        self.trials = {name: list(self._trials(name, seen)) for name in layers}
        self.found: dict[str, float] = {}
        self.remember: bool | None = None  # to be tried out

    def _trials(self, name: str, seen: Trace) -> Iterator[tuple[str, dict[str, nn.Module]]]:
        """Yield what is run of a layer, and which layers are exchanged for it.

        An input that several layers share is one tensor: it is quantized for all of them, when the
        first of them begins.
        """
        probe = self.probe
        shared = next((group for group in seen.sharing if name in group), (name,))
        group = [other for other in shared if other in probe.candidates.shapes]
        for key in probe.runs(name):
            if key[0] == "w":
                yield key, {name: self.variants[name][key]}
            elif group[0] == name:
                known = self.variants[name]
                yield key, {n: known[key] if n == name else probe.variant(n, key) for n in group}

    def run(self) -> dict[str, Tensor]:
        """Return the noise of what is run and the local errors of everything, both relative."""
        power = 0.0
        squares = dict.fromkeys(self.layers, 0.0)
        for call in self.probe.calls:
            prefix = Prefix(self.probe.model, self.watched)
            with self._comparing(squares):
                reference = prefix.record(call)
            power += _square(reference)
            if self.remember is None:
                ends = (self.layers[0], self.layers[-1])  # the second sees what the first has left
                self.remember = self.probe.prefix and prefix.repeats(call, ends)
                if self.probe.prefix and not self.remember:
                    logger.warning("the model does not repeat itself: it is run whole each time")
            with prefix.remembered() if self.remember else nullcontext():
                for name in self.layers:
                    for key, exchanged in self.trials[name]:
                        with _in_place(self.probe.model, exchanged):
                            y = prefix.rerun(call, name)
                        for member in exchanged:
                            part = _square(y - reference) / len(exchanged)
                            self._add(f"{member}|noise|{key}", part)
        relative = {}
        for key, value in self.found.items():
            name, kind, _ = key.split("|")
            whole = squares[name] if kind == "error" else power
            relative[key] = torch.tensor(value / whole if whole else 0.0, dtype=torch.float64)
        return relative

    def _add(self, key: str, value: float) -> None:
        self.found[key] = self.found.get(key, 0.0) + value

    @contextmanager
    def _comparing(self, squares: dict[str, float]) -> Iterator[None]:
        """While active, add up by how much each variant changes the output of its own layer."""

        def hook(name: str, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            squares[name] += _square(y)
            for key, variant in self.variants[name].items():
                self._add(f"{name}|error|{key}", _square(variant(*args) - y))

        handles = [
            self.probe.layer(name).register_forward_hook(partial(hook, name))
            for name in self.layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _square(x: Tensor) -> float:
    return float(x.double().square().sum())


@contextmanager
def _in_place(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    before = {name: model.get_submodule(name) for name in layers}
    for name, layer in layers.items():
        replace(model, name, layer)
    try:
        yield
    finally:
        for name, layer in before.items():
            replace(model, name, layer)
