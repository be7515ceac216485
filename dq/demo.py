"""The whole job on one checkpoint: quantize, save, reload by plain diffusers, draw, compare."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image

from dq.eval.grid import grid
from dq.eval.paired import paired_psnr
from dq.eval.report import Page
from dq.folders import new_folder
from dq.pipelines.draw import default_prompts, draw
from dq.pipelines.inspection import Inspection, inspect_folder
from dq.pipelines.pipeline import DQPipeline
from dq.recipe import Recipe

__all__ = ["Demo", "Settings", "run"]

_SHOWN = 8  # images a row of the grid


@dataclass(frozen=True)
class Demo:
    """What the demonstration found.

    Attributes:
        model: Checkpoint.
        recipe: Name of the recipe.
        float_bytes: Size of the denoiser before, in the same dtype.
        bytes_on_disk: Size of its files after.
        average_weight_bits: Scales and zero points included.
        compute_paths: Number of layers by what really ran.
        float_milliseconds: Time of one image before, all steps, text encoder and decoder included.
        milliseconds: After.
        images: How many were drawn on each side.
        psnr: Mean over the images, dB, against full precision with the same seeds.
        worst_psnr: The smallest.
        quantize_seconds: Calibration and packing.
        output: Folder with grid.png, report.html and the quantized pipeline.
    """

    model: str
    recipe: str
    float_bytes: int
    bytes_on_disk: int
    average_weight_bits: float
    compute_paths: dict[str, int]
    float_milliseconds: float
    milliseconds: float
    images: int
    psnr: float
    worst_psnr: float
    quantize_seconds: float
    output: str

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return dataclasses.asdict(self)

    def rows(self) -> list[dict[str, object]]:
        """Return the table that is printed and put on the page."""
        faster = self.float_milliseconds / self.milliseconds
        sizes = (self.float_bytes / 1e6, self.bytes_on_disk / 1e6)
        table = {
            "size of the denoiser": "{:.2f} MB -> {:.2f} MB on disk".format(*sizes),
            "bits a weight": f"{self.average_weight_bits:.2f}, scales and zero points included",
            "computes as": ", ".join(f"{n} layers {p}" for p, n in self.compute_paths.items()),
            "time an image": f"{self.float_milliseconds:.0f} ms -> {self.milliseconds:.0f} ms"
            f" ({faster:.2f} times as fast)",
            "PSNR to full precision": f"{self.psnr:.1f} dB, mean of {self.images} images with the "
            f"same seeds (worst {self.worst_psnr:.1f})",
            "time to quantize": f"{self.quantize_seconds:.0f} s",
        }
        return [{"what": what, "result": result} for what, result in table.items()]

    def __str__(self) -> str:
        lines = [f"{self.model} with {self.recipe}"]
        lines += [f"  {row['what']:24}{row['result']}" for row in self.rows()]
        lines += [f"  look at {self.output}/grid.png and {self.output}/report.html"]
        return "\n".join(lines)


@dataclass(frozen=True)
class Settings:
    """What to draw, and how.

    Args:
        images: On each side.
        steps: Denoising steps.
        guidance: Guidance scale; None for the pipeline's own.
        seed: Of the first image; image i has seed + i.
        dtype: Of everything that is not packed.
        device: Where to run.
    """

    images: int = 8
    steps: int = 25
    guidance: float | None = None
    seed: int = 0
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"


def run(model: str, recipe: str, output: Path, settings: Settings) -> Demo:
    """Run the demonstration and write its folder anew.

    Args:
        model: Checkpoint, by name or folder.
        recipe: Name or file.
        output: Folder to write; one of an earlier demonstration is replaced.
        settings: What to draw, and how.

    Returns:
        The findings.
    """
    wanted = Recipe.get(recipe)
    with new_folder(output, overwrite=True) as folder:
        pipe = DQPipeline.from_pretrained(model, dtype=settings.dtype).to(settings.device)
        prompts = _spread(default_prompts(pipe), settings.images)
        before, float_time = _timed(pipe, prompts, settings)
        float_bytes = pipe.footprint().stored_bytes
        start = time.perf_counter()
        pipe.quantize(wanted)
        quantize_seconds = time.perf_counter() - start
        pipe.save_pretrained(folder / "model")
        plain = DiffusionPipeline.from_pretrained(folder / "model", dtype=settings.dtype)
        after, quantized_time = _timed(plain.to(settings.device), prompts, settings)
        seen = inspect_folder(folder / "model", settings.dtype)
        pairs = paired_psnr(after, before)
        result = Demo(
            model=model,
            recipe=wanted.name,
            float_bytes=float_bytes,
            bytes_on_disk=seen.bytes_on_disk,
            average_weight_bits=seen.footprint.average_weight_bits,
            compute_paths={path: n for path, (n, _) in pipe.footprint().paths().items()},
            float_milliseconds=float_time,
            milliseconds=quantized_time,
            images=len(prompts),
            psnr=pairs.mean,
            worst_psnr=pairs.worst,
            quantize_seconds=quantize_seconds,
            output=str(output),
        )
        rows = {"full precision": before[:_SHOWN], wanted.name: after[:_SHOWN]}
        _write(folder, result, seen, rows, prompts[:_SHOWN])
    return result


def _spread(prompts: tuple[str, ...], count: int) -> list[str]:
    """Take `count` prompts, evenly spread over the list, or repeated if it is shorter."""
    step = max(1, len(prompts) // count)
    return [prompts[i * step % len(prompts)] for i in range(count)]


def _timed(pipe: Any, prompts: list[str], settings: Settings) -> tuple[list[Image], float]:
    """Draw, after one step to warm up; return the images and milliseconds an image."""
    seeds = range(settings.seed, settings.seed + len(prompts))
    draw(pipe, prompts[:_SHOWN], seeds[:_SHOWN], steps=1)
    start = time.perf_counter()
    images = draw(pipe, prompts, seeds, settings.steps, settings.guidance)
    return images, 1000 * (time.perf_counter() - start) / len(prompts)


def _write(
    folder: Path, result: Demo, seen: Inspection, rows: dict[str, list[Image]], prompts: list[str]
) -> None:
    picture = grid(rows, prompts)
    picture.save(folder / "grid.png")
    page = Page(f"dq: {result.model} with {result.recipe}")
    page.table(result.rows())
    page.heading("The same seeds in full precision and quantized")
    page.image(picture, "images of both pipelines, side by side")
    page.heading("Layers")
    page.table([_row(entry) for entry in seen.to_dict()["layers"]])
    page.write(folder / "report.html")


def _row(entry: dict[str, Any]) -> dict[str, object]:
    bits = 8 * entry["bytes"] / entry["weights"]
    return {
        **{k: entry[k] for k in ("name", "weight", "input", "compute_path")},
        "bits": f"{bits:.2f}",
    }
