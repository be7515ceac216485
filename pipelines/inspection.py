"""What a checkpoint holds, read from its folder: `dq inspect`."""

from __future__ import annotations

import dataclasses
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dq.errors import DQError
from dq.family import family_of
from dq.integration import DQQuantizer
from dq.kernels.measured import table
from dq.pipelines.footprint import Footprint, footprint
from dq.pipelines.loading import load_denoiser, resolve
from dq.pipelines.operations import Operations, operations
from dq.tables import aligned

__all__ = ["Inspection", "inspect_folder"]

_WEIGHT_FILES = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class Inspection:
    """A checkpoint's denoiser, from its files and its plan.

    Attributes:
        model: Folder or name as it was asked for.
        bytes_on_disk: Size of the denoiser's weight files, headers included.
        header_bytes: Of these what the headers of safetensors files take: names, shapes, checksums.
        footprint: What they hold.
        notes: Where the recipe was not followed to the letter, by layer.
        operations: Of one image at one step, in theory; None if they were not asked for.
    """

    model: str
    bytes_on_disk: int
    header_bytes: int
    footprint: Footprint
    notes: dict[str, str]
    operations: Operations | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        count = self.footprint
        return {
            "model": self.model,
            "denoiser": count.model,
            "parameters": count.parameters,
            "bytes_on_disk": self.bytes_on_disk,
            "bytes_of_headers": self.header_bytes,
            "bytes_planned": count.planned_bytes,
            "average_weight_bits": count.average_weight_bits,
            "notes": self.notes,
            "attention": [dataclasses.asdict(report) for report in count.attention],
            "theoretical": None if self.operations is None else self.operations.to_dict(),
            "layers": [
                {
                    "name": layer.name,
                    "weight": layer.weight,
                    "input": layer.input,
                    "compute_path": layer.compute_path,
                    "weights": layer.weights,
                    "bytes": layer.bytes,
                }
                for layer in count.layers
            ],
        }

    def __str__(self) -> str:
        count = self.footprint
        lines = [
            f"{self.model}: {count.model}, {count.parameters / 1e6:.2f} M parameters",
            f"on disk  {self.bytes_on_disk / 1e6:.3f} MB, of which the names of tensors are "
            f"{self.header_bytes / 1e6:.3f} MB; the plan says {count.planned_bytes / 1e6:.3f} MB",
        ]
        theory = [] if self.operations is None else [str(self.operations)]
        if not count.layers and not count.attention:
            return "\n".join([*lines, "not quantized", *theory])
        if count.layers:
            bits = f"{count.average_weight_bits:.2f} a weight"
            lines += [f"bits     {bits}, scales and zero points included", "", *_table(count), ""]
        lines += [str(report) for report in count.attention]
        lines += [table().summary(), *theory]
        lines += [f"note     {name}: {note}" for name, note in self.notes.items()]
        return "\n".join(lines)


def _table(count: Footprint) -> list[str]:
    """Group layers that are stored and computed alike."""
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for layer in count.layers:
        groups[layer.weight, layer.input, layer.compute_path].append(layer.weights)
    rows = [("layers", "weights", "weight", "input", "computes as")]
    for (weight, source, path), sizes in groups.items():
        rows.append((str(len(sizes)), f"{sum(sizes) / 1e6:.2f} M", weight, source, path))
    return aligned(rows)


def inspect_folder(
    model: str | os.PathLike[str],
    dtype: torch.dtype,
    device: str = "cpu",
    theoretical: bool = False,
) -> Inspection:
    """Load the denoiser of a checkpoint, and nothing else, and count it.

    Args:
        model: Folder of a pipeline, or a checkpoint of dq.
        dtype: Compute dtype to report for.
        device: Where it is to run: kernels differ.
        theoretical: Whether to count operations too, which takes a forward call.

    Raises:
        DQError: If it is no pipeline folder.
    """
    path = Path(resolve(model))
    if not (path / "model_index.json").is_file():
        raise DQError(f"{path} is not a pipeline folder: it has no model_index.json")
    name, denoiser = load_denoiser(str(path), None, dtype=dtype)
    files = [f for pattern in _WEIGHT_FILES for f in (path / name).glob(pattern)]
    quantizer = getattr(denoiser, "hf_quantizer", None)
    plan = quantizer.plan if isinstance(quantizer, DQQuantizer) else None
    notes = {} if plan is None else dict(plan.notes)
    size = sum(f.stat().st_size for f in files)
    denoiser = denoiser.to(device)
    theory = None
    if theoretical:
        inputs = family_of(denoiser).sample_inputs(denoiser, 1, torch.Generator().manual_seed(0))
        theory = operations(denoiser, inputs)
    headers = sum(_header_bytes(f) for f in files if f.suffix == ".safetensors")
    return Inspection(os.fspath(model), size, headers, footprint(denoiser), notes, theory)


def _header_bytes(file: Path) -> int:
    """Return the size of a safetensors header, the eight bytes that say it included."""
    with file.open("rb") as opened:
        return 8 + int.from_bytes(opened.read(8), "little")
