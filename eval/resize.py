"""How images come to the size that an extractor wants: scores depend on it, so it has a name.

Parmar et al., "On Aliased Resizing" (arXiv 2104.11222), measure by how much.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from dq.errors import unknown

__all__ = ["RULES", "resize"]


def _clean(x: Tensor, edge: int) -> Tensor:
    return F.interpolate(x, (edge, edge), mode="bicubic", antialias=True)


def _legacy_pytorch(x: Tensor, edge: int) -> Tensor:
    return F.interpolate(x, (edge, edge), mode="bilinear", align_corners=False)


def _adm(x: Tensor, edge: int) -> Tensor:
    """Bilinear as TensorFlow 1 did it: pixel i of the output reads from i times the ratio."""
    for axis in (2, 3):
        size = x.shape[axis]
        at = torch.arange(edge, dtype=torch.float64, device=x.device) * (size / edge)
        low = at.floor().long().clamp_max(size - 1)
        high = (low + 1).clamp_max(size - 1)
        shape = [1, 1, 1, 1]
        shape[axis] = edge
        part = (at - low).to(x.dtype).view(shape)
        one, two = x.index_select(axis, low), x.index_select(axis, high)
        x = one + (two - one) * part
    return x


RULES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "clean": _clean,  # antialiased bicubic, equal to PIL's and clean-fid's
    "legacy_pytorch": _legacy_pytorch,  # as pytorch-fid does: no antialiasing
    "adm": _adm,  # as the evaluation suite of ADM does, in TensorFlow
}


def resize(images: Tensor, edge: int, rule: str = "clean") -> Tensor:
    """Resize images to squares.

    Args:
        images: `(N, 3, H, W)`, numbers of 0 to 255 of any dtype.
        edge: Pixels.
        rule: One of `RULES`.

    Returns:
        `(N, 3, edge, edge)` float32, not rounded, within 0 to 255.

    Raises:
        DQError: For an unknown rule.
    """
    if rule not in RULES:
        raise unknown("resize rule", rule, RULES)
    x = images.float()
    if x.shape[-2:] == (edge, edge):
        return x
    return RULES[rule](x, edge).clamp(0, 255)
