"""Low-rank representation mimicking: features are compared where the teacher's vary most.

Zheng et al. 2025, arXiv 2404.05662v5, section 3.3, equations 10 to 13: each block's features are
projected onto the leading eigenvectors of their covariance over channels, which are found once, on
the first batch, and never change.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Mimicry", "leading"]


def _rows(features: Tensor) -> Tensor:
    """Return features as `(R, C)`: images `(B, C, H, W)`, tokens `(B, N, C)`."""
    moved = features.movedim(1, -1) if features.dim() == 4 else features
    return moved.flatten(0, -2)


def leading(features: Tensor, part: int) -> Tensor:
    """Return the eigenvectors of the covariance over channels with the largest eigenvalues.

    Args:
        features: `(B, C, H, W)` or `(B, N, C)`.
        part: K of the paper: a K-th of the directions is kept, rounded.

    Returns:
        `(C, max(1, round(C / K)))` float32, orthonormal columns.
    """
    rows = _rows(features).double()
    rows = rows - rows.mean(0)
    _, vectors = torch.linalg.eigh(rows.mT @ rows / max(1, len(rows) - 1))
    return vectors[:, -max(1, round(rows.shape[1] / part)) :].float()


class Mimicry:
    """The mean over blocks of the squared distance of projected features.

    Args:
        features: Of the teacher, on the first batch, by block.
        part: See `leading`.
        normalized: Whether each block's distance is divided by the variance of its teacher's
            projected features; the paper's is not, so that blocks of large features decide.
    """

    def __init__(
        self, features: Mapping[str, Tensor], part: int = 4, normalized: bool = False
    ) -> None:
        self.bases = {name: leading(value, part) for name, value in features.items()}
        self.sizes = {
            name: float((_rows(features[name]) @ basis).var()) if normalized else 1.0
            for name, basis in self.bases.items()
        }

    def __call__(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """Return it; names as in `features`."""
        terms = [
            F.mse_loss(_rows(student[n]) @ basis, _rows(teacher[n]) @ basis) / self.sizes[n]
            for n, basis in self.bases.items()
        ]
        return torch.stack(terms).mean()
