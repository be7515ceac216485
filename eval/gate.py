"""Thresholds: what a score must reach for a pull request to pass."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from dq.errors import DQError, unknown

__all__ = ["Gate", "gates"]

_KINDS: dict[str, tuple[Callable[[float, float], bool], str]] = {
    "max": (operator.le, "at most"),
    "min": (operator.ge, "at least"),
    "max-drop": (operator.le, "no more below full precision than"),
}


@dataclass(frozen=True)
class Gate:
    """One threshold.

    Attributes:
        kind: "max", "min" or "max-drop".
        metric: Name of the score.
        limit: Number that it is held against.
    """

    kind: str
    metric: str
    limit: float

    @classmethod
    def parse(cls, kind: str, text: str) -> Self:
        """Read `metric=number`.

        Raises:
            DQError: If it is something else.
        """
        metric, equals, number = text.partition("=")
        try:
            limit = float(number)
        except ValueError:
            limit = math.nan
        if not metric or not equals or not math.isfinite(limit):
            raise DQError(f"--{kind} {text}: expected a metric and a number, e.g. fid=1.5")
        return cls(kind, metric, limit)

    def failure(self, metrics: Mapping[str, float], baseline: Mapping[str, float]) -> str | None:
        """Return the line that says what failed, or None.

        Args:
            metrics: Of the quantized side.
            baseline: Of full precision.

        Raises:
            DQError: If the score was not computed.
        """
        if self.metric not in metrics:
            raise unknown("metric", self.metric, metrics)
        value = metrics[self.metric]
        if self.kind == "max-drop":
            if self.metric not in baseline:
                raise DQError(f"--max-drop {self.metric}: full precision has no such score")
            value = baseline[self.metric] - value
        holds, words = _KINDS[self.kind]
        if holds(value, self.limit):  # a score that is not a number holds nothing
            return None
        return f"{self.metric}: {value:.4g} is not {words} {self.limit:g}"


def gates(most: Sequence[str], least: Sequence[str], drop: Sequence[str]) -> list[Gate]:
    """Read the thresholds of a command line."""
    asked = (("max", most), ("min", least), ("max-drop", drop))
    return [Gate.parse(kind, text) for kind, texts in asked for text in texts]
