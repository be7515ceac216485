"""The paired view: the same prompts and seeds, drawn by two pipelines."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from dq.distance import cosine, psnr
from dq.errors import DQError
from dq.eval.images import check_images

__all__ = ["Paired", "check_lpips", "paired_cosine", "paired_lpips", "paired_psnr", "paired_ssim"]

_MOST_PSNR = 100.0  # of equal images, so that means stay finite


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
    def spread(self) -> float:
        """Standard deviation over the images; 0 for a single one."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else 0.0

    @property
    def worst(self) -> float:
        """The smallest value."""
        return min(self.values)


def _stacked(images: Sequence[Image] | Tensor) -> Tensor:
    if isinstance(images, Tensor):
        return check_images(images)
    arrays = [torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in images]
    for index, array in enumerate(arrays):
        if array.shape != arrays[0].shape:
            raise DQError(
                f"image {index} has size {tuple(array.shape[:0:-1])}, the first "
                f"{tuple(arrays[0].shape[:0:-1])}"
            )
    return torch.stack(arrays)


def _pairs(
    images: Sequence[Image] | Tensor, references: Sequence[Image] | Tensor
) -> tuple[Tensor, Tensor]:
    if len(images) != len(references):
        raise DQError(f"{len(images)} images cannot be paired with {len(references)}")
    one, two = _stacked(images), _stacked(references)
    if one.shape != two.shape:
        sizes = " and ".join(f"{x.shape[3]} x {x.shape[2]}" for x in (one, two))
        raise DQError(f"images of {sizes} pixels cannot be paired")
    return one, two


def paired_psnr(images: Sequence[Image] | Tensor, references: Sequence[Image] | Tensor) -> Paired:
    """Return the peak signal to noise ratio of each pair in dB; equal images count as 100.

    Args:
        images: RGB images of one size, or `(N, 3, H, W)` uint8.
        references: As many, of the same size.

    Raises:
        DQError: If the numbers or sizes differ.
    """
    one, two = _pairs(images, references)
    found = (psnr(x, y, peak=255.0) for x, y in zip(one, two, strict=True))
    return Paired(tuple(min(_MOST_PSNR, value) for value in found))


def paired_ssim(images: Sequence[Image] | Tensor, references: Sequence[Image] | Tensor) -> Paired:
    """Return the structural similarity of each pair, 1 for equal images.

    Wang et al. 2004, with the Gaussian window of 11 pixels, as torchmetrics computes it.

    Args:
        images: As for `paired_psnr`, of 11 pixels or more.
        references: Likewise.

    Raises:
        DQError: If the numbers or sizes differ.
    """
    one, two = _pairs(images, references)
    found = structural_similarity_index_measure(
        one.float(), two.float(), data_range=255.0, reduction="none"
    )
    assert isinstance(found, Tensor)  # the full images were not asked for
    return Paired(tuple(found.tolist()))


def paired_cosine(latents: Tensor, references: Tensor) -> Paired:
    """Return the cosine of each pair of latents `(N, ...)`.

    Raises:
        DQError: If their shapes differ.
    """
    if latents.shape != references.shape:
        raise DQError(
            f"latents of shapes {tuple(latents.shape)} and {tuple(references.shape)} differ"
        )
    return Paired(tuple(cosine(x, y) for x, y in zip(latents, references, strict=True)))


def check_lpips() -> None:
    """Refuse LPIPS where its package is missing.

    Raises:
        DQError: If it is.
    """
    if importlib.util.find_spec("lpips") is None:
        raise DQError("metric lpips needs the package lpips: pip install lpips")


def paired_lpips(images: Sequence[Image] | Tensor, references: Sequence[Image] | Tensor) -> Paired:
    """Return the learned perceptual distance of each pair, 0 for equal images.

    Zhang et al., "The Unreasonable Effectiveness of Deep Features" (arXiv 1801.03924), AlexNet.

    Args:
        images: As for `paired_psnr`.
        references: Likewise.

    Raises:
        DQError: If the numbers or sizes differ, or the package is missing.
    """
    check_lpips()
    import lpips

    one, two = (x.float() / 127.5 - 1 for x in _pairs(images, references))
    with torch.no_grad():
        found = lpips.LPIPS(net="alex", verbose=False)(one, two)
    return Paired(tuple(found.flatten().tolist()))
