"""What quantizing each layer does to the output of the model: the table."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from dq.errors import DQError, inside
from dq.family import Role
from dq.presets import FLOAT

__all__ = ["CONTENT", "QUALITY", "Row", "Table", "decibels", "group_of"]

CONTENT, QUALITY = "content", "quality"
_CONTENT_ROLES = (Role.CROSS_ATTENTION, Role.CROSS_KV, Role.FEED_FORWARD)


def group_of(role: Role) -> str:
    """Return the group of a role: what decides the content of an image, or its quality.

    Feed-forwards and cross-attention decide what is drawn, the rest how well (metric decoupling of
    MixDQ, Zhao et al. 2024, arXiv 2405.17873).
    """
    return CONTENT if role in _CONTENT_ROLES else QUALITY


def decibels(noise: float) -> float:
    """Return the signal to noise ratio of a relative noise power, in dB."""
    return math.inf if noise <= 0 else -10.0 * math.log10(noise)


@dataclass(frozen=True)
class Row:
    """One layer.

    Attributes:
        name: Of the layer.
        role: What it does.
        shape: (N, K) of its weight.
        entry: Shape of its input in the calls that were measured on.
        macs: Multiply-adds for one image.
        weight: Relative noise power at the model's output, `sum (y' - y)^2 / sum y^2`, when only
            the weight is quantized, by format.
        input: The same when only the input is.
        measured: What was run, as "w:FORMAT" and "a:FORMAT"; everything else is estimated.
        estimated: What had been estimated for these.
        content: Optional, SSIM of decoded images in place of both, as `w:FORMAT` and `a:FORMAT`.
        seconds: Optional, time of the layer by "weight|input".
    """

    name: str
    role: str
    shape: tuple[int, int]
    entry: tuple[int, ...]
    macs: int
    weight: Mapping[str, float]
    input: Mapping[str, float]
    measured: tuple[str, ...] = ()
    estimated: tuple[float, ...] = ()
    content: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """Content or quality."""
        return group_of(Role(self.role))

    def noise(self, weight: str, input: str) -> float:
        """Return the noise of both; what stays float makes none."""
        both = (weight, self.weight), (input, self.input)
        return sum(0.0 if name == FLOAT else table[name] for name, table in both)


@dataclass(frozen=True)
class Table:
    """All layers of a model, in the order in which they run.

    Attributes:
        model: Class name of the denoiser.
        rows: One a layer.
        sharing: Layers that see the same input, in groups.
        facts: How it was measured.
    """

    model: str
    rows: tuple[Row, ...]
    sharing: tuple[tuple[str, ...], ...]
    facts: Mapping[str, Any]

    def noise(self, choice: Mapping[str, tuple[str, str]]) -> float:
        """Return the noise that a choice of (weight, input) by layer is predicted to make: the sum.

        Layers that are not chosen stay float.
        """
        return sum(row.noise(*choice[row.name]) for row in self.rows if row.name in choice)

    def fragile(self, count: int = 20) -> list[Row]:
        """Return the layers with the most noise, each in its worst format."""
        return sorted(self.rows, key=lambda row: -sum(_worst(row)))[:count]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Invert `to_dict`."""
        lists = ("shape", "entry", "measured", "estimated")
        rows = [Row(**{**row, **{k: tuple(row[k]) for k in lists}}) for row in values["rows"]]
        sharing = tuple(tuple(group) for group in values["sharing"])
        return cls(values["model"], tuple(rows), sharing, values["facts"])

    def save(self, path: Path) -> None:
        """Write JSON."""
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read JSON.

        Raises:
            DQError: If there is no such table.
        """
        with inside(str(path)):
            try:
                return cls.from_dict(json.loads(path.read_text()))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise DQError(f"no sensitivity table ({error}); run dq sensitivity") from error


def _worst(row: Row) -> list[float]:
    return [max(table.values(), default=0.0) for table in (row.weight, row.input)]
