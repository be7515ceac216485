"""What was found: a table for the terminal, JSON for machines."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dq.eval.gate import Gate
from dq.eval.score import Scores
from dq.tables import aligned, cells

__all__ = ["FULL", "Candidate", "Report", "number"]

FULL = "full precision"
_FLOAT = "float"


@dataclass(frozen=True)
class Candidate:
    """One quantized pipeline and what it scored.

    Attributes:
        name: Checkpoint, or recipe.
        scores: Against full precision.
        stored_bytes: All tensors of the denoiser.
        bytes_on_disk: Its weight files; None for a recipe, which has none.
        average_weight_bits: Scales included; 16 or 32 if it is not quantized.
        compute_paths: Number of layers by what they compute on.
        attention: How the operands of attention are quantized, in words; "float" if they are not.
        peak_megabytes: The denoiser with its copies, and what drawing a batch takes for a while;
            1e6 bytes, None if the system does not tell.
        seconds_per_image: Median over the batches, text encoder and decoder included.
        full_seconds_per_image: Of full precision.
        seconds_per_step: The same over the steps.
    """

    name: str
    scores: Scores
    stored_bytes: int
    bytes_on_disk: int | None
    average_weight_bits: float
    compute_paths: Mapping[str, int]
    attention: str
    peak_megabytes: float | None
    seconds_per_image: float
    full_seconds_per_image: float
    seconds_per_step: float


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        full: Bits and megabytes of full precision.
        facts: Extractor, resize rule, number of images, seeds, versions.
        candidates: One a pipeline.
        folder: Where images and page are.
    """

    full: Mapping[str, float]
    facts: Mapping[str, Any]
    candidates: tuple[Candidate, ...]
    folder: Path

    @property
    def metrics(self) -> Mapping[str, float]:
        """The scores of the first candidate, which gates hold against their thresholds."""
        return self.candidates[0].scores.metrics

    def failures(self, gates: Sequence[Gate]) -> list[str]:
        """Return a line for each threshold that a candidate missed."""
        found = []
        for each in self.candidates:
            for gate in gates:
                line = gate.failure(each.scores.metrics, each.scores.baseline)
                if line is not None:
                    found.append(f"{each.name}: {line}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; `metrics` are those of the first candidate."""
        return {
            "metrics": dict(self.metrics),
            "baseline": dict(self.candidates[0].scores.baseline),
            "facts": dict(self.facts),
            "candidates": [dataclasses.asdict(each) for each in self.candidates],
            "folder": str(self.folder),
        }

    def rows(self) -> list[dict[str, object]]:
        """Return a table of sizes, times and scores, full precision in its first line."""
        rows: list[dict[str, object]] = [
            {"": FULL, "bits": f"{self.full['bits']:.2f}", "MB": f"{self.full['megabytes']:.2f}"}
        ]
        for each in self.candidates:
            size = each.stored_bytes if each.bytes_on_disk is None else each.bytes_on_disk
            bits = f"{each.average_weight_bits:.2f}"
            rows.append({"": each.name, "bits": bits, "MB": f"{size / 1e6:.2f}"})
        if any(each.attention != _FLOAT for each in self.candidates):
            said = [_FLOAT, *(each.attention for each in self.candidates)]
            for row, words in zip(rows, said, strict=True):
                row["attention"] = words
        self._add_scores(rows, reference=False)
        times = [self.candidates[0].full_seconds_per_image]
        times += [each.seconds_per_image for each in self.candidates]
        peaks = [None, *(each.peak_megabytes for each in self.candidates)]
        for row, time, peak in zip(rows, times, peaks, strict=True):
            row |= {"peak MB": "" if peak is None else f"{peak:.0f}", "s/image": f"{time:.3f}"}
        return rows

    def reference_rows(self) -> list[dict[str, object]]:
        """Return a table of the distances to the reference set; empty without one."""
        rows: list[dict[str, object]] = [
            {"": name} for name in (FULL, *(each.name for each in self.candidates))
        ]
        self._add_scores(rows, reference=True)
        return rows if len(rows[0]) > 1 else []

    def _add_scores(self, rows: list[dict[str, object]], reference: bool) -> None:
        """Add the columns of metrics to the reference set, or of all others."""
        names = dict.fromkeys(n for c in self.candidates for n in c.scores.metrics)
        for name in [n for n in names if n.endswith("-reference") is reference]:
            rows[0][name] = number(self.candidates[0].scores.baseline.get(name))
            for row, each in zip(rows[1:], self.candidates, strict=True):
                spread = each.scores.spread.get(name)
                value = number(each.scores.metrics.get(name))
                row[name] = value if spread is None else f"{value} ± {spread:.2g}"

    def __str__(self) -> str:
        lines = aligned(cells(self.rows()))
        if self.reference_rows():
            lines += ["", *aligned(cells(self.reference_rows()))]
        lines += ["", ", ".join(f"{k} {v}" for k, v in self.facts.items() if k != "warning")]
        if "warning" in self.facts:
            lines.append(f"warning: {self.facts['warning']}")
        return "\n".join([*lines, f"look at {self.folder}/report.html"])


def number(value: float | None) -> str:
    """Return a number in four digits; nothing for None."""
    return "" if value is None else f"{value:.4g}"
