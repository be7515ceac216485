"""What a model can spare: `dq sensitivity`."""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState

from dq.budgets.front import Point, Trial, front, random_bits, uniform_bits
from dq.budgets.page import write_page
from dq.budgets.report import Report, correlation
from dq.calibrate import CalibrationSpec
from dq.engine import start
from dq.family import WIDE_ROLES
from dq.folders import check_free, new_folder
from dq.methods.bos import find_kept
from dq.methods.mixdq import MixDQ
from dq.pipelines.draw import PipelineSource
from dq.pipelines.loading import resolve
from dq.pipelines.pipeline import DQPipeline
from dq.progress import track
from dq.recipe import Recipe
from dq.sensitivity.survey import Settings, find, prepare, sample
from dq.sensitivity.table import Table

__all__ = ["Asked", "Report", "run"]


@dataclass(frozen=True)
class Asked:
    """What is to be found.

    Args:
        method: Formats that compete, and limits other than bytes.
        settings: What the table is found on.
        bits: Budgets to show, in average bits a weight.
        random: Random choices to hold predictions against.
    """

    method: MixDQ
    settings: Settings
    bits: tuple[float, ...] = (2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 8.0)
    random: int = 0


def run(
    model: str,
    folder: Path,
    asked: Asked,
    calibration: CalibrationSpec,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    overwrite: bool = False,
) -> Report | None:
    """Find the sensitivity of a model's layers, and write `sensitivity.json` and `report.html`.

    Args:
        model: Folder or hub name of a pipeline, or a checkpoint of dq.
        folder: Where to write.
        asked: What to find.
        calibration: Prompts, how many, steps, seed.
        dtype: Of the pipeline; measurements themselves are in float32.
        device: Where to run.
        overwrite: Whether a folder that exists is replaced.

    Returns:
        What was found; None in all but the first of several processes.
    """
    check_free(folder, overwrite, resolve(model))
    state = PartialState()
    pipe = DQPipeline.from_pretrained(model, dtype=dtype).to(device)
    recipe = Recipe("sensitivity", (asked.method,), calibration)
    with tempfile.TemporaryDirectory(prefix="dq-") as work:
        job = start(pipe.denoiser.eval(), recipe, PipelineSource(pipe), Path(work))
        candidates = asked.method.candidates(job, find_kept(job).every)
        probe = prepare(job.calibration, candidates, asked.settings)
        begin = time.perf_counter()
        table = find(job.calibration, probe, asked.settings)
        seconds = time.perf_counter() - begin
        if not state.is_main_process:
            return None
        after = sample(job.calibration, asked.settings, first=asked.settings.batches)
    trial = Trial(table, probe, after or probe.calls)
    report = Report(
        table,
        tuple(front(trial, asked.bits, asked.method.float_share)),
        tuple(_uniform(trial)),
        tuple(_random(trial, asked.random)),
        _compare(table),
        seconds,
        folder,
    )
    with new_folder(folder, overwrite) as new:
        (new / "sensitivity.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n")
        keys = [*(f"w:{name}" for name in probe.weights), *(f"a:{name}" for name in probe.inputs)]
        write_page(report, new, model, _widths(trial), keys)
    return report


def _widths(trial: Trial) -> dict[str, int]:
    """Return the bits of each weight format."""
    tables = trial.probe.candidates.weights.values()
    return {name: spec.code_bits for table in tables for name, spec in table.items()}


def _uniform(trial: Trial) -> list[Point]:
    """Return the choices of one weight format for all, from few bits to many."""
    widths = _widths(trial)
    widest = max(widths, key=lambda name: widths[name])
    names = sorted(widths, key=lambda name: widths[name])
    return [
        trial.point(f"{name} everywhere", uniform_bits(trial, name, widest, WIDE_ROLES))
        for name in track(names, "trying uniform formats")
    ]


def _random(trial: Trial, count: int) -> list[Point]:
    seeds = track(range(count), "trying random choices")
    return [trial.point(str(seed), random_bits(trial, seed)) for seed in seeds]


def _compare(table: Table) -> dict[str, float]:
    """Return the rank correlation of estimated and measured noise, by format that was run."""
    pairs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in table.rows:
        for key, guess in zip(row.measured, row.estimated, strict=True):
            noise = row.weight if key[0] == "w" else row.input
            pairs[key].append((noise[key[2:]], guess))
    return {
        key: correlation([a for a, _ in both], [b for _, b in both])
        for key, both in pairs.items()
        if len(both) > 2
    }
