"""What `dq sensitivity` has found: for the terminal, and as JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from dq.budgets.front import Point
from dq.sensitivity.table import Row, Table, decibels
from dq.tables import aligned, cells

__all__ = ["Report", "correlation"]


def correlation(one: list[float], other: list[float]) -> float:
    """Return the rank correlation of two lists (Spearman)."""
    return float(spearmanr(one, other).statistic)


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        table: Noise by layer and format.
        front: Best choices by size.
        uniform: Choices with the same format everywhere.
        random: Choices to see whether predictions hold.
        estimate: Rank correlation of the estimate from gradients with what was measured, by format
            ("w:int4"); empty if nothing was measured.
        seconds: Time it took to find the table.
        folder: Where the page is.
    """

    table: Table
    front: tuple[Point, ...]
    uniform: tuple[Point, ...]
    random: tuple[Point, ...]
    estimate: dict[str, float]
    seconds: float
    folder: Path

    def fragile(self, count: int = 20) -> list[dict[str, object]]:
        """Return a table of the layers with the most noise."""
        return [_line(row) for row in self.table.fragile(count)]

    def sizes(self) -> list[dict[str, object]]:
        """Return a table of choices by size."""
        points = sorted((*self.front, *self.uniform), key=lambda point: point.bytes)
        return [
            {
                "choice": point.name,
                "bits": f"{point.bits:.2f}",
                "MB": f"{point.bytes / 1e6:.2f}",
                "predicted dB": f"{decibels(point.predicted):.1f}",
                "real dB": f"{decibels(point.real):.1f}",
            }
            for point in points
        ]

    @property
    def additivity(self) -> float | None:
        """Rank correlation of predicted and real noise over the random choices."""
        if len(self.random) < 3:
            return None
        return correlation([p.predicted for p in self.random], [p.real for p in self.random])

    def words(self) -> list[str]:
        """Say what was done and how far it can be trusted."""
        facts = ", ".join(f"{key} {value}" for key, value in self.table.facts.items())
        lines = [f"{len(self.table.rows)} layers in {self.seconds:.1f} s; {facts}"]
        if self.additivity is not None:
            lines.append(
                f"predicted and real noise of {len(self.random)} random choices: "
                f"rank correlation {self.additivity:.3f}"
            )
        if self.estimate:
            said = ", ".join(f"{name} {value:.3f}" for name, value in self.estimate.items())
            lines.append(f"estimate from gradients, rank correlation with what was run: {said}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            **self.table.to_dict(),
            "front": [dataclasses.asdict(point) for point in self.front],
            "uniform": [dataclasses.asdict(point) for point in self.uniform],
            "random": [dataclasses.asdict(point) for point in self.random],
            "additivity": self.additivity,
            "estimate": self.estimate,
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        parts = [aligned(cells(self.fragile())), aligned(cells(self.sizes())), self.words()]
        text = "\n\n".join("\n".join(map(str.rstrip, lines)) for lines in parts if lines)
        return f"{text}\nlook at {self.folder}/report.html"


def _line(row: Row) -> dict[str, object]:
    line: dict[str, object] = {"layer": row.name, "role": row.role, "group": row.group}
    for kind, noise in (("weight", row.weight), ("input", row.input)):
        for name, value in noise.items():
            line[f"{kind} {name}"] = f"{decibels(value):.1f}"
    return line
