"""Sets of images: uint8 RGB, read one batch at a time, with every fault named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dq.errors import DQError
from dq.folders import IMAGE_SUFFIXES, images_below

__all__ = ["check_images", "image_files", "read_batches", "to_tensor"]


def image_files(folder: Path) -> list[Path]:
    """Return the images of a folder and of those below it, sorted by name.

    Raises:
        DQError: If there are fewer than two.
    """
    if not folder.is_dir():
        raise DQError(f"{folder} is not a folder of images")
    files = images_below(folder)
    if len(files) < 2:
        raise DQError(
            f"{folder} holds {len(files)} images ({', '.join(IMAGE_SUFFIXES)}); "
            "scores need at least 2"
        )
    return files


def to_tensor(image: Image.Image) -> Tensor:
    """Return an image as `(3, H, W)` uint8.

    Raises:
        DQError: If it is not RGB.
    """
    if image.mode == "P":  # a palette is a way to store, not a kind of picture
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    if image.mode != "RGB":
        raise DQError(
            f"mode {image.mode} instead of RGB; convert it on purpose, a transparent or grey image "
            "scored as RGB means something else"
        )
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_batches(
    files: Sequence[Path], batch: int, skip_bad: bool = False
) -> Iterator[tuple[Tensor, list[Path]]]:
    """Read images, a batch at a time.

    Args:
        files: As many as there are; memory holds one batch.
        batch: Images in it.
        skip_bad: Whether files that cannot be read are left out instead of being an error.

    Yields:
        `(N, 3, H, W)` uint8 and the files that they come from.

    Raises:
        DQError: For a file that is no image, is not RGB or has another size than the first.
    """
    images: list[Tensor] = []
    used: list[Path] = []
    size: torch.Size | None = None
    for file in files:
        try:
            with Image.open(file) as opened:
                image = to_tensor(opened)
        except (OSError, UnidentifiedImageError, SyntaxError, DQError) as error:
            if skip_bad:
                continue
            raise DQError(f"{file}: {error}; --skip-bad leaves such files out") from error
        if size is not None and image.shape != size:
            raise DQError(
                f"{file} has {image.shape[2]} x {image.shape[1]} pixels, the images before it "
                f"{size[2]} x {size[1]}; scores compare images of one size"
            )
        size = image.shape
        images.append(image)
        used.append(file)
        if len(images) == batch:
            yield torch.stack(images), used
            images, used = [], []
    if images:
        yield torch.stack(images), used


def check_images(images: Tensor) -> Tensor:
    """Return images as they must be to be scored.

    Args:
        images: `(N, 3, H, W)` uint8.

    Raises:
        DQError: For other shapes, and for floating point, whose range nobody knows: 0 to 1, -1 to 1
            and 0 to 255 are all in use, and a wrong guess gives a score all the same.
    """
    if images.dim() != 4 or images.shape[1] != 3:
        raise DQError(f"images are (N, 3, H, W), not {tuple(images.shape)}")
    if images.dtype != torch.uint8:
        low, high = (float(x) for x in images.aminmax()) if images.numel() else (0.0, 0.0)
        raise DQError(
            f"images are uint8, not {str(images.dtype).removeprefix('torch.')} of {low:g} to "
            f"{high:g}; for 0 to 1: (images * 255).round().to(torch.uint8)"
        )
    return images
