"""What runs fastest at which size: measured once a machine by `dq measure`, shipped otherwise.

Choices are read from a table, never timed on the fly: the same checkpoint then draws the same image
in every process.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from dq.errors import DQError
from dq.folders import cache_folder

__all__ = ["Entry", "Shape", "Table", "fastest", "table"]

_SHIPPED = Path(__file__).with_name("measured.json")


# The extents that decide. Attention: queries, keys, features of a head. Linear layers: rows of the
# input, and weights, K times N.
Shape = tuple[int, ...]


def _distance(one: Shape, other: Shape) -> float:
    """Return how far apart two shapes are, in factors of e."""
    return sum(abs(math.log(a / b)) for a, b in zip(one, other, strict=True))


@dataclass(frozen=True)
class Entry:
    """What some competitors took at one size.

    Args:
        shape: The size.
        milliseconds: By competitor.
    """

    shape: Shape
    milliseconds: Mapping[str, float]


@dataclass(frozen=True)
class Table:
    """Everything that was measured on a machine.

    Args:
        machine: Which, in words.
        entries: By kind of competition: "attention" or "linear".
    """

    machine: str
    entries: Mapping[str, tuple[Entry, ...]]

    def nearest(self, kind: str, shape: Shape) -> Entry:
        """Return the entry whose size is nearest, in the logarithm."""
        return min(self.entries[kind], key=lambda entry: _distance(entry.shape, shape))

    def __str__(self) -> str:
        """Return the file's text: JSON, an entry a line."""
        lines = [f' "machine": {json.dumps(self.machine)}']
        for kind, entries in self.to_dict().items():
            if kind != "machine":
                rows = ",\n  ".join(map(json.dumps, entries))
                lines.append(f" {json.dumps(kind)}: [\n  {rows}\n ]")
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "machine": self.machine,
            **{
                kind: [{"shape": list(e.shape), "milliseconds": dict(e.milliseconds)} for e in some]
                for kind, some in self.entries.items()
            },
        }

    def summary(self) -> str:
        """Say in words where int8 loses to bfloat16."""
        sizes: dict[int, list[str]] = {}
        for entry in self.entries["linear"]:
            times = entry.milliseconds
            if min(times.get("rows", math.inf), times["oneDNN"]) > times["bf16"]:
                sizes.setdefault(entry.shape[0], []).append(str(math.isqrt(entry.shape[1])))
        where = "; ".join(f"{rows} rows: {', '.join(found)}" for rows, found in sizes.items())
        return (
            f"int8 loses to bf16 at K = N of, by rows of the input: {where or 'none measured'}\n"
            f"(measured on {self.machine})"
        )

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read a table from a file.

        Raises:
            DQError: If it is damaged.
        """
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            machine = values.pop("machine")
            entries = {
                kind: tuple(Entry(tuple(e["shape"]), e["milliseconds"]) for e in some)
                for kind, some in values.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DQError(
                f"{file} is not a table of measurements ({error}); delete it, or run `dq measure`"
            ) from error
        return cls(machine, entries)

    def write(self) -> Path:
        """Write the table to where `table` finds it; processes that run keep the one they have."""
        file = _own()
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(str(self), encoding="utf-8")
        partial.replace(file)
        return file


def _own() -> Path:
    return cache_folder() / "measured.json"


@functools.cache
def table() -> Table:
    """Return this machine's table if `dq measure` has made one, else the one that dq comes with."""
    return Table.read(_own() if _own().is_file() else _SHIPPED)


@functools.cache
def fastest(kind: str, shape: Shape, among: tuple[str, ...]) -> str:
    """Return the fastest of some competitors at the size nearest to `shape`."""
    known = table().nearest(kind, shape).milliseconds
    return min(among, key=lambda name: known.get(name, math.inf))
