"""How long each layer takes in each format, on this machine."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dq.nn.layers import Layer
from dq.nn.packed import packed
from dq.plan import LayerSpec
from dq.progress import track
from dq.sensitivity.candidates import Candidates
from dq.sensitivity.table import Row, Table

__all__ = ["timed"]


@torch.no_grad()
def timed(table: Table, candidates: Candidates, model: nn.Module, repeats: int = 5) -> Table:
    """Return the table with the seconds of each layer and option.

    Layers of the same form are timed once, with codes that mean nothing: time does not depend on
    them. Options are timed in turn, medians are kept.

    Args:
        table: Of the model.
        candidates: The same that the table was found for.
        model: The denoiser, float, in the dtype that it will run in.
        repeats: Rounds.
    """
    known: dict[object, dict[str, float]] = {}
    rows = []
    for row in track(table.rows, "timing layers"):
        layer = model.get_submodule(row.name)
        assert isinstance(layer, (nn.Linear, nn.Conv2d))  # candidates are nothing else
        options = _options(row, candidates)
        key = (repr(layer), row.entry, tuple(options.items()))
        if key not in known:
            known[key] = _time(layer, row.entry, options, repeats)
        rows.append(dataclasses.replace(row, seconds=known[key]))
    return dataclasses.replace(table, rows=tuple(rows))


def _options(row: Row, candidates: Candidates) -> dict[str, LayerSpec | None]:
    pairs = candidates.options(row.name)
    specs = {f"{w}|{i}": candidates.spec(row.name, w, i) for w, i in pairs}
    # A kept token takes nothing that a clock would notice, and there is none to give here.
    return {k: s and dataclasses.replace(s, kept_every=0) for k, s in specs.items()}


def _time(
    layer: Layer, shape: tuple[int, ...], options: dict[str, LayerSpec | None], repeats: int
) -> dict[str, float]:
    x = torch.randn(shape).to(layer.weight)
    runs = {name: _runnable(layer, spec) for name, spec in options.items()}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(x)
    for _ in range(repeats):
        for name, run in runs.items():
            _wait(x)
            start = time.perf_counter()
            run(x)
            _wait(x)
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _runnable(layer: Layer, spec: LayerSpec | None) -> Callable[[Tensor], Tensor]:
    if spec is None:
        return layer
    made = packed(layer, spec, layer.weight.device)
    made.weight.zero_()
    made.weight_scale.fill_(1.0)
    if made.input_affine is not None:
        made.input_affine.copy_(torch.tensor([0.05, 0.0]))
    made.bias = layer.bias
    return made
