"""Real images for the denoiser, in the place of those that the pipeline is drawing.

While the pipeline draws as always, what it gives its denoiser is exchanged for an image of a
folder, with as much noise as its scheduler has at that step. Prompts, sizes and guidance remain
the pipeline's own. What it draws meanwhile means nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from dq.errors import DQError
from dq.folders import IMAGE_SUFFIXES, images_below

__all__ = ["caption_of", "folder_files", "noised", "pixels_of"]


def folder_files(folder: str) -> list[Path]:
    """Return the images of a folder and of those below it, sorted by name.

    Raises:
        DQError: If there are none.
    """
    files = images_below(Path(folder))
    if not files:
        raise DQError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return files


def caption_of(file: Path) -> str:
    """Return what an image shows: the text beside it, `cat.txt` of `cat.png`, else its name."""
    beside = file.with_suffix(".txt")
    text = beside.read_text() if beside.is_file() else file.stem.replace("_", " ")
    return text.strip()


@contextmanager
def noised(pipe: Any, denoiser: nn.Module, files: Sequence[Path], seed: int) -> Iterator[None]:
    """While active, the denoiser sees these images, row by row, instead of what is being drawn.

    Args:
        pipe: Whose autoencoder and scheduler are used.
        denoiser: Its denoiser.
        files: One a row of a batch; with guidance the rows of both halves.
        seed: Of the noise, which is the same at every step of an image.

    Raises:
        DQError: If the pipeline has no autoencoder, or its denoiser sees no latent images.
    """
    name, *_ = inspect.signature(denoiser.forward).parameters
    known: dict[str, Tensor] = {}

    def exchange(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        drawn = args[0] if args else kwargs[name]
        _check(pipe, drawn)
        if "latents" not in known:
            known["latents"] = _encoded(pipe, files, drawn)
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(known["latents"].shape, generator=generator)
            known["noise"] = noise.to(drawn)
        rows = len(drawn) // len(files)
        latents, noise = (known[k].repeat(rows, 1, 1, 1) for k in ("latents", "noise"))
        time = kwargs["timestep"] if "timestep" in kwargs else args[1]
        seen = _with_noise(pipe.scheduler, latents, noise, torch.as_tensor(time)).to(drawn)
        return ((seen, *args[1:]), kwargs) if args else (args, {**kwargs, name: seen})

    with denoiser.register_forward_pre_hook(exchange, with_kwargs=True, prepend=True):
        yield


def _check(pipe: Any, drawn: Any) -> None:
    latent = isinstance(drawn, Tensor) and drawn.dim() == 4 and drawn.is_floating_point()
    if not latent or getattr(pipe, "vae", None) is None:
        raise DQError(
            f"{type(pipe).__name__} does not denoise latent images of a shape (B, C, H, W): leave "
            "out the folder of images, and calibrate by prompts or classes"
        )


def pixels_of(vae: Any) -> int:
    """Return how many pixels a latent of an autoencoder is wide: every block but one halves."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def _encoded(pipe: Any, files: Sequence[Path], like: Tensor) -> Tensor:
    """Return the latents of images, cut to the size that is being drawn."""
    config = pipe.vae.config
    factor = pixels_of(pipe.vae)
    size = (like.shape[3] * factor, like.shape[2] * factor)
    arrays = []
    for file in files:
        with Image.open(file) as image:
            fitted = ImageOps.fit(_on_white(image), size, Image.Resampling.BICUBIC)
        arrays.append(torch.from_numpy(np.array(fitted)).permute(2, 0, 1))
    pixels = torch.stack(arrays).to(like) / 127.5 - 1
    weight = next(pipe.vae.parameters())
    latents = pipe.vae.encode(pixels.to(weight)).latent_dist.mode()
    shift = getattr(config, "shift_factor", None) or 0.0
    return ((latents - shift) * config.scaling_factor).to(like)


def _on_white(image: Image.Image) -> Image.Image:
    whole = image.convert("RGBA")
    paper = Image.new("RGBA", whole.size, "white")
    return Image.alpha_composite(paper, whole).convert("RGB")


def _with_noise(scheduler: Any, latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """Add as much noise as there is at a timestep, in the scheduler's own way."""
    times = time.reshape(-1).cpu()
    times = times.expand(len(latents)) if len(times) == 1 else times
    if hasattr(scheduler, "scale_noise"):  # flow matching
        mixed: Tensor = scheduler.scale_noise(latents, times, noise)
        return mixed
    mixed = scheduler.add_noise(latents, noise, times)
    scaled: Tensor = scheduler.scale_model_input(mixed, time.reshape(-1)[0])
    return scaled
