"""Draw images with any pipeline: by prompt or by class, in batches, one seed an image."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from dq.calibrate import CalibrationSpec
from dq.errors import DQError, check_known
from dq.pipelines.noised import caption_of, folder_files, noised, pixels_of
from dq.pipelines.prompts import PROMPTS
from dq.progress import track
from dq.work import fingerprint

__all__ = ["PipelineSource", "default_prompts", "draw", "repeated"]

T = TypeVar("T")


def default_prompts(pipe: Any) -> tuple[str, ...]:
    """Return the prompts that suit a pipeline: its own list, its classes, or the built-in one."""
    own = tuple(getattr(pipe, "dq_prompts", ()))
    if own or not _takes(pipe, "class_labels"):
        return own or PROMPTS
    names = list(_classes(pipe))
    return tuple(names[:: max(1, len(names) // 64)][:64])


def repeated(prompts: Sequence[str], count: int) -> tuple[str, ...]:
    """Return so many prompts, from the start again where there are fewer."""
    return tuple(prompts[index % len(prompts)] for index in range(count))


def _takes(pipe: Any, argument: str) -> bool:
    return argument in inspect.signature(pipe.__call__).parameters


def _classes(pipe: Any) -> dict[str, int]:
    """Return the numbers of the classes by name; checkpoints without names have only numbers."""
    if getattr(pipe, "labels", None):
        return dict(sorted(pipe.labels.items(), key=lambda entry: int(entry[1])))
    count = pipe.transformer.config.num_embeds_ada_norm
    return {str(number): number for number in range(count)}


def draw(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance: float | None = None,
    batch: int = 8,
    output_type: str = "pil",
    size: Sequence[int] = (),
) -> list[Any]:
    """Draw one image a prompt.

    Args:
        pipe: A diffusers pipeline that takes prompts or class labels.
        prompts: Texts or class names.
        seeds: One a prompt: an image does not depend on its neighbours in the batch.
        steps: Denoising steps.
        guidance: Classifier-free guidance scale; None for the pipeline's own default.
        batch: Images drawn at a time; pipelines that cannot give each image of a batch a seed of
            its own draw one.
        output_type: "pil", "np" (float, 0 to 1, NHWC), "pt" or "latent", as in diffusers: for
            pipelines of tokens their codes, `(H, W)` int64.
        size: (height, width), or (frames, height, width) of videos; none for the pipeline's own.

    Returns:
        One entry a prompt: an image, or of video pipelines all frames, one after the other.

    Raises:
        DQError: If the pipeline takes neither prompts nor classes, or not that size; if there is
            no step, or no image at a time.
    """
    if steps < 1 or batch < 1:
        raise DQError(f"{steps} steps, {batch} images at a time: each is 1 or more")
    images: list[Any] = []
    alone = not _takes_seeds(pipe)
    together = 1 if alone else batch
    starts = range(0, len(prompts), together)
    with _quiet(pipe), _sized(pipe, size) as sizes:
        for start in track(starts, "drawing"):
            part = list(prompts[start : start + together])
            generators = [torch.Generator().manual_seed(s) for s in seeds[start : start + together]]
            arguments: dict[str, Any] = {"num_inference_steps": steps, **sizes}
            arguments["generator"] = generators[0] if alone else generators
            if guidance is not None:
                arguments["guidance_scale"] = guidance
            drawn = pipe(**_condition(pipe, part, output_type), **arguments)
            images.extend(drawn.images if hasattr(drawn, "images") else drawn.frames)
    return images


@contextmanager
def _sized(pipe: Any, size: Sequence[int]) -> Iterator[dict[str, int]]:
    """While active, the pipeline draws images of a size, if it is called with what is yielded."""
    known: dict[int, tuple[str, ...]] = {
        0: (),
        2: ("height", "width"),
        3: ("num_frames", "height", "width"),
    }
    names = known.get(len(size))
    if names is None or any(number < 1 for number in size):
        raise DQError(f"a size is (height, width) or (frames, height, width), not {tuple(size)}")
    missing = [name for name in names if not _takes(pipe, name)]
    multiple = _multiple(pipe) if size else 1
    if any(number % multiple for number in size[-2:]):
        kind = type(pipe).__name__
        raise DQError(f"height and width of {kind} are multiples of {multiple}, not {size[-2:]}")
    if not missing:
        yield dict(zip(names, size, strict=True))
        return
    if missing != ["height", "width"] or not _takes(pipe, "class_labels") or len({*size}) != 1:
        square = ", square images of any size" if _takes(pipe, "class_labels") else ""
        raise DQError(f"{type(pipe).__name__} takes no {' and '.join(missing)}{square}")
    # DiTPipeline asks its transformer how large an image is.
    model, scale = pipe.transformer, _scale(pipe)
    before = model._internal_dict
    model._internal_dict = FrozenDict({**before, "sample_size": size[0] // scale})
    try:
        yield {}
    finally:
        model._internal_dict = before


def _scale(pipe: Any) -> int:
    """Return how many pixels a latent is wide; DiTPipeline does not say, nor do all others (1)."""
    if _takes(pipe, "class_labels"):
        return pixels_of(pipe.vae)
    return int(getattr(pipe, "vae_scale_factor", 1))


def _multiple(pipe: Any) -> int:
    """Return what height and width are multiples of: whole patches; UNets' pipelines ask for 8."""
    if not hasattr(pipe, "transformer"):
        return math.lcm(_scale(pipe), 8)
    patch = pipe.transformer.config.get("patch_size")
    return _scale(pipe) * (patch if isinstance(patch, int) else 1)


def _takes_seeds(pipe: Any) -> bool:
    """Whether each image of a batch may have a generator: aMUSEd's scheduler has one for all."""
    return type(pipe.scheduler).__name__ != "AmusedScheduler"


def _condition(pipe: Any, prompts: list[str], output_type: str) -> dict[str, Any]:
    if _takes(pipe, "prompt"):
        arguments: dict[str, Any] = {"prompt": prompts, "output_type": output_type}
        if _takes(pipe, "use_resolution_binning"):
            # The default size needs no binning, and PixArt's raises for sizes never published.
            arguments["use_resolution_binning"] = False
        return arguments
    if not _takes(pipe, "class_labels"):
        raise DQError(f"{type(pipe).__name__} takes neither prompts nor class labels")
    classes = _classes(pipe)
    check_known("class of this model", prompts, classes)
    kind = "np" if output_type == "latent" else output_type  # DiTPipeline always decodes
    return {"class_labels": [classes[name] for name in prompts], "output_type": kind}


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """Silence the pipeline's own progress bar: one bar over all batches says more."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe._progress_bar_config = before


def _turns(every: Sequence[T], spec: CalibrationSpec) -> list[T]:
    """Return one of them an image, from the first that is asked for on, in turns."""
    return [every[(spec.first + i) % len(every)] for i in range(spec.n)]


@dataclass(frozen=True)
class PipelineSource:
    """Makes the denoiser of a pipeline run, for calibration; see `dq.calibrate.Source`.

    Args:
        pipe: The pipeline.
        guidance: Guidance scale; None for the pipeline's own default.
    """

    pipe: Any
    guidance: float | None = None

    def batches(self, spec: CalibrationSpec) -> int:
        """Return how many batches there are."""
        return -(-spec.n // spec.batch)

    @torch.no_grad()
    def run(self, spec: CalibrationSpec, batch: int) -> Tensor:
        """Draw the images of one batch; latents where the pipeline gives them."""
        if not spec.folder:
            return self._drawn(spec, batch, "latent")
        files = _turns(folder_files(spec.folder), spec)
        mine = [files[i] for i in self._indices(spec, batch)]
        with noised(self.pipe, self.pipe.denoiser, mine, spec.seed + batch * spec.batch):
            return self._drawn(spec, batch, "latent")

    @torch.no_grad()
    def images(self, spec: CalibrationSpec, batch: int) -> Tensor:
        """Draw the images of one batch, `(B, 3, H, W)` in [0, 1]."""
        return self._drawn(spec, batch, "np").permute(0, 3, 1, 2)

    def _drawn(self, spec: CalibrationSpec, batch: int, output_type: str) -> Tensor:
        prompts, indices = self._prompts(spec), self._indices(spec, batch)
        chosen = [prompts[i] for i in indices]
        seeds = [spec.seed + i for i in indices]
        drawn = draw(
            self.pipe, chosen, seeds, spec.steps, self.guidance, spec.batch, output_type, spec.size
        )
        return torch.stack([torch.as_tensor(image).float().cpu() for image in drawn])

    def _indices(self, spec: CalibrationSpec, batch: int) -> range:
        return range(batch * spec.batch, min((batch + 1) * spec.batch, spec.n))

    def _prompts(self, spec: CalibrationSpec) -> list[str]:
        """Return one prompt an image."""
        if spec.prompts is None and spec.folder:
            return _turns([caption_of(file) for file in folder_files(spec.folder)], spec)
        return _turns(spec.prompts or default_prompts(self.pipe), spec)

    def held_out(self, spec: CalibrationSpec, n: int) -> CalibrationSpec:
        """Return the prompts that follow those of `spec`, with seeds of their own."""
        return dataclasses.replace(spec, n=n, first=spec.first + spec.n, seed=spec.held_out_seed)

    def identity(self, spec: CalibrationSpec) -> dict[str, Any]:
        """Return the prompts, the scheduler, the images, and a fingerprint of what encodes them."""
        pipe = self.pipe
        known = ("encoder", "vae") if spec.folder else ("encoder",)
        parts = {n: p for n, p in pipe.components.items() if any(word in n for word in known)}
        files = folder_files(spec.folder) if spec.folder else []
        return {
            "files": [hashlib.sha256(file.read_bytes()).hexdigest() for file in files],
            "calibration": dataclasses.asdict(spec),
            "prompts": self._prompts(spec),
            "guidance": self.guidance,
            "scheduler": [type(pipe.scheduler).__name__, repr(dict(pipe.scheduler.config))],
            "encoders": {
                name: fingerprint(part, {})
                for name, part in parts.items()
                if isinstance(part, nn.Module)
            },
        }
