"""Precision and recall: how many images look real, and how much of what is real is covered."""

from __future__ import annotations

import torch
from torch import Tensor

from dq.errors import DQError
from dq.eval.features import check_dimensions

__all__ = ["precision_recall"]

_STRIP = 1024  # rows of a distance matrix held at a time


def precision_recall(images: Tensor, reference: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Return improved precision and recall.

    Kynkäänniemi et al., "Improved Precision and Recall Metric" (arXiv 1904.06991): each set is
    described by balls around its points that reach to their k-th neighbours.

    Args:
        images: `(N, d)` features.
        reference: `(M, d)` features.
        neighbours: k.

    Returns:
        Share of images within a ball of the reference, and the reverse.

    Raises:
        DQError: If a set has no k-th neighbours, or dimensions differ.
    """
    if min(len(images), len(reference)) <= neighbours:
        raise DQError(f"precision and recall need more than {neighbours} images on each side")
    check_dimensions(images.shape[1], reference.shape[1])
    x, y = images.double(), reference.double()
    return _covered(x, y, neighbours), _covered(y, x, neighbours)


def _covered(points: Tensor, centres: Tensor, neighbours: int) -> float:
    """Return the share of points within a ball around some centre."""
    # The nearest of all is the centre itself.
    radii = torch.cat(
        [torch.cdist(c, centres).kthvalue(neighbours + 1).values for c in centres.split(_STRIP)]
    )
    inside = [(torch.cdist(p, centres) <= radii).any(1) for p in points.split(_STRIP)]
    return float(torch.cat(inside).double().mean())
