"""What an export has written, in words and numbers."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from dq.tables import aligned

__all__ = ["Exported", "ExportedLayer"]


@dataclass(frozen=True)
class ExportedLayer:
    """What became of one packed layer.

    Attributes:
        name: Module name.
        form: What it is now: a form of the target, or the float dtype.
        reason: Why it is float, in words; empty if it is not.
        weights: Number of weights.
        bytes: What stands for its weight in the file.
    """

    name: str
    form: str
    reason: str
    weights: int
    bytes: int


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        to: Name of the target.
        output: The new folder.
        model: Class name of the denoiser.
        layers: One entry a packed layer.
        bytes_on_disk: Size of the denoiser's file, header included.
        loads: What reads it, in words.
    """

    to: str
    output: str
    model: str
    layers: tuple[ExportedLayer, ...]
    bytes_on_disk: int
    loads: str

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        groups: dict[tuple[str, str], list[ExportedLayer]] = defaultdict(list)
        for layer in sorted(self.layers, key=lambda layer: bool(layer.reason)):
            groups[layer.form, layer.reason].append(layer)
        rows = [("layers", "weights", "bytes", "written as", "because")]
        for (found, reason), layers in groups.items():
            weights = f"{sum(layer.weights for layer in layers) / 1e6:.2f} M"
            size = f"{sum(layer.bytes for layer in layers) / 1e6:.2f} MB"
            rows.append((str(len(layers)), weights, size, found, reason))
        return "\n".join(
            [
                f"{self.output}: {self.model} for {self.to}, {self.bytes_on_disk / 1e6:.3f} MB",
                *(line.rstrip() for line in aligned(rows)),
                f"read by  {self.loads}",
            ]
        )
