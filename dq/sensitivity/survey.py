"""From calibration to table: what `dq sensitivity` and MixDQ share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dq.calibrate import Calibration, Call
from dq.errors import DQError, unknown
from dq.folders import cache_folder
from dq.sensitivity.candidates import Candidates
from dq.sensitivity.content import with_content
from dq.sensitivity.gradient import estimate
from dq.sensitivity.measure import measure
from dq.sensitivity.probe import Probe
from dq.sensitivity.table import Table
from dq.work import Work, fingerprint

__all__ = ["Settings", "Survey", "find", "prepare", "sample", "survey"]

_VERSION = 1  # of what is measured; tables of another one are measured anew


@dataclass(frozen=True)
class Settings:
    """What a table is found on.

    Args:
        weights: Weight formats to run; the others follow by squared error.
        inputs: Input formats to run.
        batches: Batches of the calibration's images.
        steps: Denoising steps of each, spread over the trajectory.
        fast: Estimate from gradients instead of running anything layer by layer.
        content: What the content group is scored by beside noise: "noise" for nothing else, or
            "ssim" of finished images, as in the paper.
        prefix: Whether what comes before a layer is remembered; False to compare times.
    """

    weights: tuple[str, ...] = ("int4",)
    inputs: tuple[str, ...] = ("int8",)
    batches: int = 1
    steps: int = 4
    fast: bool = False
    content: str = "noise"
    prefix: bool = True

    def __post_init__(self) -> None:
        for name in ("batches", "steps"):
            if getattr(self, name) < 1:
                raise DQError(f"a sensitivity needs {name} of 1 or more")
        if self.content not in ("noise", "ssim"):
            raise unknown("content score", self.content, ("noise", "ssim"))


@dataclass(frozen=True)
class Survey:
    """A table, and what it was found with.

    Attributes:
        table: The noise of each format of each layer.
        probe: On what it was found: calls, candidates, input ranges.
    """

    table: Table
    probe: Probe


def survey(calibration: Calibration, candidates: Candidates, settings: Settings) -> Survey:
    """Find the table of a model, or take the one that was found before.

    Args:
        calibration: Of the model, float.
        candidates: Formats that compete.
        settings: How to find it.

    Raises:
        NeedsData: If nothing makes the denoiser run.
    """
    probe = prepare(calibration, candidates, settings)
    return Survey(find(calibration, probe, settings), probe)


def prepare(calibration: Calibration, candidates: Candidates, settings: Settings) -> Probe:
    """Capture the calls to measure on, and the ranges of all inputs."""
    calls = sample(calibration, settings)
    plans = candidates.input_plans()
    ranges = calibration.ranges_of(list(plans.values()))
    inputs = tuple(name for name in settings.inputs if name in candidates.inputs)
    return Probe(
        calibration.model,
        calls,
        dict(zip(plans, ranges, strict=True)),
        candidates,
        settings.weights,
        inputs or tuple(candidates.inputs)[:1],
        settings.prefix,
    )


def find(calibration: Calibration, probe: Probe, settings: Settings) -> Table:
    """Measure or estimate.

    Measured tables are kept in the user's cache, under a fingerprint of model, prompts and
    settings, layer by layer: an interrupted measurement continues, and another budget needs no
    other table.
    """
    source, spec = calibration.source, calibration.spec
    assert source is not None  # it has given the calls
    if settings.fast:
        return estimate(probe)
    key = {
        "version": _VERSION,
        "settings": dataclasses.asdict(settings),
        "candidates": probe.candidates.to_dict(),
        "source": dict(source.identity(spec)),
    }
    work = Work(cache_folder() / "sensitivity" / fingerprint(calibration.model, key))
    table = measure(probe, work)
    if settings.content == "ssim":
        table = with_content(table, probe, source, spec, work)
    return table


def sample(calibration: Calibration, settings: Settings, first: int = 0) -> list[Call]:
    """Return some captured calls, in float32.

    Args:
        calibration: Where they come from.
        settings: How many.
        first: Batch to begin with.
    """
    calls: list[Call] = []
    for index, batch in enumerate(calibration.batches()):
        if first <= index < first + settings.batches:
            calls += [_float32(call, calibration) for call in _spread(batch, settings.steps)]
    return calls


def _spread(calls: Sequence[Call], count: int) -> list[Call]:
    """Return so many of a trajectory's calls, from the middle of equal parts of it."""
    count = min(count, len(calls))
    return [calls[(2 * part + 1) * len(calls) // (2 * count)] for part in range(count)]


def _float32(value: Any, calibration: Calibration) -> Any:
    if isinstance(value, Mapping):
        return {k: _float32(v, calibration) for k, v in value.items()}
    if isinstance(value, Tensor):
        device = next(calibration.model.parameters()).device
        return value.to(device, torch.float32 if value.is_floating_point() else value.dtype)
    return value
