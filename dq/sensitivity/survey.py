"""From calibration to table: what `dq sensitivity` and MixDQ share."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dq.calibrate import Calibration
from dq.calls import Call
from dq.errors import DQError, unknown
from dq.folders import cache_folder
from dq.full_precision import as_float32, floated
from dq.sensitivity.candidates import Candidates
from dq.sensitivity.content import with_content
from dq.sensitivity.gradient import estimate
from dq.sensitivity.measure import measure
from dq.sensitivity.probe import Noise, Probe, tabulate
from dq.sensitivity.table import Table
from dq.sensitivity.trace import trace
from dq.work import Work, fingerprint

__all__ = ["Settings", "Survey", "fill_table", "find", "prepare", "sample", "survey"]

_VERSION = 1  # of what is measured; tables of another one are measured anew


@dataclass(frozen=True)
class Settings:
    """What a table is found on.

    Args:
        weights: Weight formats to run; the others keep their estimated ratio to these.
        inputs: Input formats to run.
        share: Of the layers, those with the most noise by the estimate, that are run one by one; 0
            leaves the estimate as it is.
        batches: Batches of the calibration's images.
        steps: Denoising steps of each, spread over the trajectory.
        content: What the content group is scored by beside noise: "noise" for nothing else, or
            "ssim" of finished images, as in the paper.
        prefix: Whether what comes before a layer is remembered; False to compare times.
    """

    weights: tuple[str, ...] = ("int4",)
    inputs: tuple[str, ...] = ("int8",)
    share: float = 0.25
    batches: int = 1
    steps: int = 4
    content: str = "noise"
    prefix: bool = True

    def __post_init__(self) -> None:
        for name in ("batches", "steps"):
            if getattr(self, name) < 1:
                raise DQError(f"a sensitivity needs {name} of 1 or more")
        if not 0 <= self.share <= 1:
            raise DQError(f"share is a part of the layers, 0 to 1, not {self.share}")
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
    """Estimate the noise of all formats from gradients, and measure the most fragile layers.

    What is found is kept in the user's cache, under a fingerprint of model, prompts and settings,
    call by call and layer by layer: an interrupted measurement continues, and another budget needs
    no other table.
    """
    source, spec = calibration.source, calibration.spec
    assert source is not None  # it has given the calls
    key = {
        "version": _VERSION,
        "settings": dataclasses.asdict(settings),
        "candidates": probe.candidates.to_dict(),
        "source": dict(source.identity(spec)),
    }
    work = Work(cache_folder() / "sensitivity" / fingerprint(calibration.model, key))
    table = fill_table(probe, settings.share, work)
    if settings.content == "ssim":
        table = with_content(table, probe, source, spec, work)
    return table


def fill_table(probe: Probe, share: float, work: Work) -> Table:
    """Estimate all layers and measure a share of them.

    Args:
        probe: What, and on what.
        share: Of the layers, those with the most noise by the estimate.
        work: Where finished stages are kept.
    """
    with as_float32(probe.model):
        seen = trace(probe.model, probe.calls[0])
        layers = [name for name in seen.order if name in probe.candidates.shapes]
        estimated = estimate(probe, layers, work)
        order = sorted(layers, key=lambda name: -_fragility(probe, name, estimated))
        worst = order[: round(share * len(layers))]
        measured = measure(probe, [name for name in layers if name in worst], seen, work)
    return tabulate(probe, seen, estimated, measured)


def _fragility(probe: Probe, name: str, estimated: Mapping[str, Noise]) -> float:
    return sum(estimated[name][key] for key in probe.runs(name))


def sample(calibration: Calibration, settings: Settings, first: int = 0) -> list[Call]:
    """Return some captured calls, in float32.

    Args:
        calibration: Where they come from.
        settings: How many.
        first: Batch to begin with.
    """
    batches = itertools.islice(calibration.batches(), first, first + settings.batches)
    return [
        floated(call, calibration.device)
        for batch in batches
        for call in _spread(batch, settings.steps)
    ]


def _spread(calls: Sequence[Call], count: int) -> list[Call]:
    """Return so many of a trajectory's calls, from the middle of equal parts of it."""
    count = min(count, len(calls))
    return [calls[(2 * part + 1) * len(calls) // (2 * count)] for part in range(count)]
