"""How far apart two tensors are: used by observers, methods, benchmarks and evaluation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["cosine", "mse", "psnr", "relative_error", "sqnr"]


def mse(x: Tensor, reference: Tensor) -> float:
    """Mean squared error; any shape, computed in float64."""
    return float((x.double() - reference.double()).square().mean())


def relative_error(x: Tensor, reference: Tensor) -> float:
    """L2 norm of the difference over the L2 norm of the reference (0 = equal)."""
    difference = (x.double() - reference.double()).norm()
    return float(difference / reference.double().norm().clamp_min(1e-300))


def sqnr(x: Tensor, reference: Tensor) -> float:
    """Signal to quantization noise ratio in dB, `10 log10(sum ref^2 / sum (x - ref)^2)`."""
    error = relative_error(x, reference)
    return math.inf if error == 0 else -20.0 * math.log10(error)


def cosine(x: Tensor, reference: Tensor) -> float:
    """Cosine of the angle between the flattened tensors, in [-1, 1]."""
    a, b = x.double().flatten(), reference.double().flatten()
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0, eps=1e-300))


def psnr(x: Tensor, reference: Tensor, peak: float = 1.0) -> float:
    """Peak signal to noise ratio in dB.

    Args:
        x: Image or batch of images, any shape, values in [0, peak].
        reference: Same shape and range.
        peak: Largest possible value: 1.0 for float images, 255 for uint8.

    Returns:
        `10 log10(peak^2 / mse)`; infinity for equal images.
    """
    error = mse(x, reference)
    return math.inf if error == 0 else 10.0 * math.log10(peak * peak / error)
