"""Changes of inputs to sweep over: every combination of parts, with random numbers."""

from __future__ import annotations

from itertools import product

import torch

from dq.transform import Transform, TransformSpec

__all__ = ["KINDS", "transform"]

KINDS = tuple(
    TransformSpec(shift, scale, rotation)
    for shift, scale, rotation in product((False, True), (False, True), (0, 4, 8))
    if shift or scale or rotation
)
"""All parts that a transform can have; rotations fit any multiple of 8 channels."""


def transform(kind: TransformSpec, channels: int, seed: int = 0) -> Transform:
    """Return a transform of a kind: shifts of about 2, scales from about a third to three."""
    generator = torch.Generator().manual_seed(seed)
    shift = 2 * torch.randn(channels, generator=generator)
    scale = torch.exp(0.5 * torch.randn(channels, generator=generator))
    return Transform(shift if kind.shift else None, scale if kind.scale else None, kind.rotation)
