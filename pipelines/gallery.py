"""Many images of one pipeline, drawn into a folder: resumable, and shared between processes.

Image i is drawn for prompt i with seed `seed + i`, in batches that are the same whoever draws them:
a batch is the unit that is skipped when it is there already, and that a process takes or leaves.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor

from dq.errors import DQError
from dq.memory import peak_growth
from dq.pipelines.draw import draw
from dq.progress import track

__all__ = ["Gallery", "Settings", "read_gallery"]

_RECORD = "gallery.json"


@dataclass(frozen=True)
class Settings:
    """What is drawn; two galleries can be compared image by image if theirs are equal.

    Args:
        prompts: One an image: texts, or names of classes.
        seed: Of the first image; image i has `seed + i`.
        steps: Denoising steps.
        guidance: Guidance scale; None for the pipeline's own.
        batch: Images drawn together.
        size: (height, width), or (frames, height, width); none for the pipeline's own.
    """

    prompts: tuple[str, ...]
    seed: int = 0
    steps: int = 25
    guidance: float | None = None
    batch: int = 8
    size: tuple[int, ...] = ()

    def differences(self, other: Settings) -> list[str]:
        """Return the names of what differs."""
        names = [field.name for field in dataclasses.fields(self)]
        return [name for name in names if getattr(self, name) != getattr(other, name)]


@dataclass(frozen=True)
class Gallery:
    """A folder of images that belong together.

    Args:
        folder: Where they are.
        model: What drew them, in words and in a fingerprint: another model is another gallery.
        settings: What is drawn.
    """

    folder: Path
    model: str
    settings: Settings

    @property
    def files(self) -> list[Path]:
        """The image files in order, drawn or not."""
        return [self.folder / f"{index:05}.png" for index in range(len(self.settings.prompts))]

    def batches(self) -> list[range]:
        """Return the indices of each batch."""
        count, batch = len(self.settings.prompts), self.settings.batch
        return [range(start, min(start + batch, count)) for start in range(0, count, batch)]

    def missing(self) -> list[range]:
        """Return the batches that are still to be drawn."""
        return [batch for batch in self.batches() if not self._latents(batch).is_file()]

    def latents(self) -> Tensor | None:
        """Return what the decoder was given, `(N, ...)` float32; None if nothing was seen."""
        parts = [load_file(self._latents(batch)).get("latents") for batch in self.batches()]
        return (
            None
            if any(p is None for p in parts)
            else torch.cat([p for p in parts if p is not None])
        )

    def seconds(self) -> list[float]:
        """Return what each batch took to draw."""
        return [float(load_file(self._latents(batch))["seconds"]) for batch in self.batches()]

    def peak_bytes(self) -> int | None:
        """Return the most that drawing a batch took for a while; None if the system did not say."""
        known = [load_file(self._latents(batch)).get("bytes") for batch in self.batches()]
        return max((int(k) for k in known if k is not None), default=None)

    def _latents(self, batch: range) -> Path:
        return self.folder / "batches" / f"{batch.start:05}.safetensors"

    def open(self) -> None:
        """Make the folder, or check that what is in it is this gallery's.

        Raises:
            DQError: If other images are there.
        """
        record = self.folder / _RECORD
        drawn = [f for f in self.folder.rglob("*") if f.is_file() and f != record]
        if record.is_file():
            there = read_gallery(self.folder)
            differing = self.settings.differences(there.settings)
            differing += ["model"] if there.model != self.model else []
            if not differing:
                return
            if drawn:  # a run that failed at once has left nothing that could be mixed up
                raise DQError(
                    f"{self.folder} holds other images: they differ in {', '.join(differing)}; "
                    "choose another folder, or delete this one"
                )
        elif drawn:
            raise DQError(f"{self.folder} holds other files; choose an empty folder")
        (self.folder / "batches").mkdir(parents=True, exist_ok=True)
        values = {"model": self.model, **dataclasses.asdict(self.settings)}
        partial = record.with_suffix(".partial")
        partial.write_text(json.dumps(values, indent=1) + "\n")
        partial.replace(record)

    def draw(self, pipe: Any) -> None:
        """Draw what is missing. Under `accelerate launch` each process draws its share.

        Args:
            pipe: The pipeline.
        """
        state = PartialState()
        if state.is_main_process:
            self.open()
        state.wait_for_everyone()
        # Shares are of all batches: what is missing changes while others draw.
        share = self.batches()[state.process_index :: state.num_processes]
        mine = [batch for batch in share if not self._latents(batch).is_file()]
        for batch in track(mine, f"drawing {self.folder.name}"):
            self._draw(pipe, batch)
        state.wait_for_everyone()

    def _draw(self, pipe: Any, batch: range) -> None:
        settings = self.settings
        images: list[Any] = []
        seconds = 0.0

        def run() -> None:
            nonlocal seconds
            start = time.perf_counter()
            images.extend(draw(
                pipe, settings.prompts[batch.start : batch.stop],
                [settings.seed + index for index in batch], settings.steps, settings.guidance,
                batch=settings.batch, size=settings.size,
            ))  # fmt: skip
            seconds = time.perf_counter() - start

        with _decoded(pipe) as seen:
            growth = peak_growth(run)
            if growth is None:
                run()
        record = {"seconds": torch.tensor(seconds, dtype=torch.float64)}
        if growth is not None:
            record["bytes"] = torch.tensor(growth)
        if seen and sum(map(len, seen)) == len(images):
            record["latents"] = torch.cat(seen)
        for index, image in zip(batch, images, strict=True):
            image.save(self.files[index])
        partial = self._latents(batch).with_suffix(".partial")
        save_file(record, partial)
        partial.replace(self._latents(batch))  # last: this says that the images are whole


def read_gallery(folder: Path) -> Gallery:
    """Return the gallery that a folder holds.

    Raises:
        DQError: If it holds none.
    """
    record = folder / _RECORD
    if not record.is_file():
        raise DQError(f"{folder} is no gallery: it has no {_RECORD}")
    try:
        values = json.loads(record.read_text())
        model = values.pop("model")
        lists = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
        settings = Settings(**{**values, **lists})
    except (ValueError, KeyError, TypeError) as error:
        raise DQError(f"{record} is damaged ({error}); delete the folder and draw again") from error
    return Gallery(folder, model, settings)


@contextmanager
def _decoded(pipe: Any) -> Iterator[list[Tensor]]:
    """Note what the pipeline's decoder is given."""
    seen: list[Tensor] = []
    vae = getattr(pipe, "vae", None)
    if vae is None:
        yield seen
        return
    decode = vae.decode

    def noted(z: Tensor, *args: Any, **options: Any) -> Any:
        seen.append(z.detach().float().cpu())
        return decode(z, *args, **options)

    vae.decode = noted
    try:
        yield seen
    finally:
        del vae.decode  # the class's own comes back
