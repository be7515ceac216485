"""The paired view: the same prompts and seeds, drawn by two pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL.Image import Image

from dq.distance import psnr
from dq.errors import DQError

__all__ = ["Paired", "paired_psnr"]


@dataclass(frozen=True)
class Paired:
    """One number an image, against the reference image of the same prompt and seed.

    Attributes:
        values: In the order of the prompts.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the images."""
        return float(np.mean(self.values))

    @property
    def worst(self) -> float:
        """The smallest value."""
        return min(self.values)


def paired_psnr(images: Sequence[Image], references: Sequence[Image]) -> Paired:
    """Return the peak signal to noise ratio of each pair in dB.

    Args:
        images: RGB images.
        references: As many, of the same sizes.

    Returns:
        One value a pair; equal images count as 100 dB, so that means stay finite.

    Raises:
        DQError: If the numbers or sizes differ.
    """
    if len(images) != len(references):
        raise DQError(f"{len(images)} images cannot be paired with {len(references)}")
    values = []
    for index, (image, reference) in enumerate(zip(images, references, strict=True)):
        if image.size != reference.size:
            raise DQError(f"pair {index}: sizes {image.size} and {reference.size} differ")
        values.append(min(100.0, psnr(_tensor(image), _tensor(reference), peak=255.0)))
    return Paired(tuple(values))


def _tensor(image: Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB")))
