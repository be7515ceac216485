"""A labelled grid of 24 drawings, to be looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dq.checkpoints.train import clip, data
from dq.checkpoints.train.parts import Work

__all__ = ["PROMPTS", "draw", "rank", "sheet"]

PROMPTS = (
    *("red apple", "banana", "strawberry", "carrot", "hamburger", "slice of pizza"),
    *("birthday cake", "hot beverage", "cat face", "panda face", "penguin", "crab"),
    *("tropical fish", "butterfly", "sunflower", "evergreen tree", "automobile", "rocket"),
    *("airplane", "house building", "umbrella", "alarm clock", "guitar", "soccer ball"),
)
_COLUMNS = 6
_CELL = 128
_LINE = 18


def draw(
    pipe: Any, prompts: tuple[str, ...] = PROMPTS, steps: int = 25, cfg: float = 3.0
) -> Tensor:
    """Draw one picture a prompt, with the seeds 0, 1, 2, ... (nothing is picked by hand).

    Args:
        pipe: A `StableDiffusionPipeline` or a `DiTPipeline`.
        prompts: Names of emoji.
        steps: Denoising steps.
        cfg: The guidance scale.

    Returns:
        `(N, 3, 64, 64)` float32 in [0, 1].
    """
    generators = [torch.Generator().manual_seed(n) for n in range(len(prompts))]
    options = {"num_inference_steps": steps, "guidance_scale": cfg, "generator": generators}
    pipe.set_progress_bar_config(disable=True)
    if hasattr(pipe, "get_label_ids"):
        images = pipe(pipe.get_label_ids(list(prompts)), output_type="np", **options).images
    else:
        images = pipe(list(prompts), output_type="np", **options).images
    return torch.from_numpy(images).permute(0, 3, 1, 2).float()


@torch.no_grad()
def rank(work: Work, pictures: Tensor, prompts: tuple[str, ...] = PROMPTS) -> tuple[int, float]:
    """Let the CLIP model name the pictures.

    Args:
        work: Holds the CLIP model.
        pictures: `(N, 3, 64, 64)` in [0, 1].
        prompts: What they should show.

    Returns:
        How many pictures score best with their own name among the names of all base emoji, and the
        mean CLIP score (cosine x 100).
    """
    names = list(dict.fromkeys(e.captions[0] for e in work.art.emoji if e.default))
    ids = clip.tokenize(work.tokenizer, names).to(work.device)
    pixels = (2 * pictures - 1).to(work.device)
    out = work.clip(input_ids=ids, pixel_values=pixels)
    cosines = out.image_embeds @ out.text_embeds.T
    own = torch.tensor([names.index(p) for p in prompts], device=cosines.device)
    hits = int((cosines.argmax(1) == own).sum())
    return hits, 100 * float(cosines.gather(1, own[:, None]).mean())


def sheet(pictures: Tensor, file: Path, labels: tuple[str, ...] = PROMPTS) -> None:
    """Write the pictures at twice their size, with their labels, on white.

    Args:
        pictures: `(N, 3, 64, 64)` in [0, 1].
        file: The PNG to write.
        labels: One a picture.
    """
    rows = -(-len(labels) // _COLUMNS)
    canvas = Image.new("RGB", (_COLUMNS * _CELL, rows * (_CELL + _LINE)), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for n, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        left, top = n % _COLUMNS * _CELL, n // _COLUMNS * (_CELL + _LINE)
        pixels = (255 * picture.clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()
        image = Image.fromarray(pixels).resize((2 * data.SIZE,) * 2, Image.Resampling.BICUBIC)
        canvas.paste(image, (left, top))
        pen.text((left + _CELL // 2, top + _CELL + 1), label, "black", font, anchor="ma")
    file.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(file, optimize=True)
