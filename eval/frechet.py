"""The Fréchet distance between two sets of features: FID, when the features are Inception's.

Heusel et al., "GANs Trained by a Two Time-Scale Update Rule" (arXiv 1706.08500), equation 6. For
Gaussians with means m and covariances S

    d² = |m1 - m2|² + tr S1 + tr S2 - 2 tr (S1 S2)^½

It is biased: with fewer images it is larger, and by how much depends on the model. Compare it at
equal numbers of images only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from dq.errors import DQError
from dq.eval.features import check_dimensions

__all__ = ["Moments", "frechet_distance", "frechet_distance_of_features"]


@dataclass(frozen=True)
class Moments:
    """Number, mean and covariance of features, in float64; all that the distance needs.

    Attributes:
        count: Number of images N.
        mean: `(d,)` float64.
        covariance: `(d, d)` float64, divided by N - 1.
    """

    count: int
    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """Return the moments of `(N, d)` features.

        Raises:
            DQError: If there are fewer than two.
        """
        if len(features) < 2:
            raise DQError(f"a covariance needs at least 2 images, not {len(features)}")
        x = features.double()
        mean = x.mean(0)
        centred = x - mean
        return cls(len(x), mean, centred.T @ centred / (len(x) - 1))

    @classmethod
    def over(cls, batches: Iterable[Tensor]) -> Self:
        """Return the moments of features that come batch by batch, holding one at a time.

        Raises:
            DQError: If there are fewer than two.
        """
        whole: Moments | None = None
        for x in batches:
            several = len(x) > 1
            part = cls.of(x) if several else cls(1, x[0].double(), x.new_zeros(1).double())
            whole = part if whole is None else whole.merged(part)
        if whole is None or whole.count < 2:
            raise DQError("a covariance needs at least 2 images")
        return cls(whole.count, whole.mean, whole.covariance)

    def merged(self, other: Moments) -> Moments:
        """Return the moments of both sets together (Chan, Golub and LeVeque 1979)."""
        check_dimensions(len(self.mean), len(other.mean))
        count = self.count + other.count
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        scatter = (
            self.covariance * (self.count - 1)
            + other.covariance * (other.count - 1)
            + torch.outer(apart, apart) * (self.count * other.count / count)
        )
        return Moments(count, mean, scatter / (count - 1))


def frechet_distance(one: Moments, two: Moments) -> float:
    """Return the distance of two sets that are known by their moments.

    The square root's trace is that of the symmetric `(S1^½ S2 S1^½)^½`, which has the same
    eigenvalues and stays real.

    Raises:
        DQError: If the features have different numbers of dimensions.
    """
    check_dimensions(len(one.mean), len(two.mean))
    values, vectors = torch.linalg.eigh(one.covariance)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ two.covariance @ root).clamp_min(0).sqrt().sum()
    traces = one.covariance.trace() + two.covariance.trace()
    return max(0.0, float((one.mean - two.mean).square().sum() + traces - 2 * cross))


def frechet_distance_of_features(one: Tensor, two: Tensor) -> float:
    """Return the distance of two sets of features, by the cheaper of two exact ways.

    With fewer images than dimensions the trace of the root is the sum of singular values of
    `A Bᵀ`, where A and B are the centred features over `(N - 1)^½`: a matrix of N by N numbers.

    Args:
        one: `(N, d)`.
        two: `(M, d)`.

    Raises:
        DQError: If there are fewer than two of either, or their dimensions differ.
    """
    check_dimensions(one.shape[1], two.shape[1])
    if min(len(one), len(two)) >= one.shape[1]:
        return frechet_distance(Moments.of(one), Moments.of(two))
    for features in (one, two):
        if len(features) < 2:
            raise DQError(f"a covariance needs at least 2 images, not {len(features)}")
    (mean1, a), (mean2, b) = (_centred(x.double()) for x in (one, two))
    cross = torch.linalg.svdvals(a @ b.T).sum()
    traces = a.square().sum() + b.square().sum()
    return max(0.0, float((mean1 - mean2).square().sum() + traces - 2 * cross))


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean(0)
    return mean, (x - mean) / (len(x) - 1) ** 0.5
