"""Distances by kernel two-sample tests: KID and CMMD. Unbiased, hence fit for few images.

Both are estimates of the squared maximum mean discrepancy (Gretton et al. 2012, lemma 6)

    MMD² = mean k(x, x') + mean k(y, y') - 2 mean k(x, y),    x != x', y != y'
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dq.errors import DQError

__all__ = ["Estimate", "cmmd", "kid"]

_SIGMA = 10.0  # of CMMD's Gaussian kernel, on features of length 1
_STRIP = 1024  # rows of a kernel matrix held at a time


@dataclass(frozen=True)
class Estimate:
    """A number and how sure it is.

    Attributes:
        value: Mean.
        error: Standard error of the mean.
    """

    value: float
    error: float


def kid(
    one: Tensor, two: Tensor, subset: int = 1000, subsets: int = 100, seed: int = 0
) -> Estimate:
    """Return the kernel inception distance.

    Binkowski et al., "Demystifying MMD GANs" (arXiv 1801.01401): the polynomial kernel
    `(x·y / d + 1)³`, averaged over random subsets.

    Args:
        one: `(N, d)` features.
        two: `(M, d)` features.
        subset: Images in a subset; all images if there are fewer.
        subsets: How many.
        seed: Of the subsets.

    Returns:
        The mean over the subsets and its standard error. Subsets that hold all images are equal:
        then the error comes from leaving out one block of images at a time.

    Raises:
        DQError: If there are fewer than two of either, or their dimensions differ.
    """
    _check(one, two)
    size = min(subset, len(one), len(two))
    if size == len(one) == len(two):
        return _jackknife(one.double(), two.double())
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        x, y = (f[torch.randperm(len(f), generator=generator)[:size]].double() for f in (one, two))
        values.append(_mmd(_cubic(x, x), _cubic(y, y), _cubic(x, y)))
    found = torch.tensor(values, dtype=torch.float64)
    return Estimate(float(found.mean()), float(found.std() / subsets**0.5))


def _jackknife(x: Tensor, y: Tensor, blocks: int = 10) -> Estimate:
    """Estimate once with all images, and the error with each block left out (Tukey 1958)."""
    xx, yy, xy = _cubic(x, x), _cubic(y, y), _cubic(x, y)
    whole = _mmd(xx, yy, xy)
    count = min(blocks, len(x) // 2)
    if count < 2:
        return Estimate(whole, float("nan"))
    group = torch.arange(len(x)) * count // len(x)
    left = []
    for block in range(count):
        keep = (group != block).nonzero().flatten()
        left.append(_mmd(*(m[keep][:, keep] for m in (xx, yy, xy))))
    values = torch.tensor(left, dtype=torch.float64)
    spread = (values - values.mean()).square().sum() * (count - 1) / count
    return Estimate(whole, float(spread.sqrt()))


def cmmd(one: Tensor, two: Tensor) -> float:
    """Return the CLIP maximum mean discrepancy, times 1000.

    Jayasumana et al., "Rethinking FID" (arXiv 2401.09603): a Gaussian kernel of width 10 on CLIP
    embeddings of length 1.

    Args:
        one: `(N, d)` embeddings of any length.
        two: `(M, d)` likewise.

    Raises:
        DQError: If there are fewer than two of either, or their dimensions differ.
    """
    _check(one, two)
    x, y = (torch.nn.functional.normalize(f.double(), dim=1) for f in (one, two))
    sums = []
    for a, b, same in ((x, x, True), (y, y, True), (x, y, False)):
        total = sum(float(_gauss(part, b).sum()) for part in a.split(_STRIP))
        pairs = len(a) * (len(b) - 1) if same else len(a) * len(b)
        sums.append((total - (len(a) if same else 0)) / pairs)  # k(x, x) = 1
    return 1000 * (sums[0] + sums[1] - 2 * sums[2])


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _gauss(x: Tensor, y: Tensor) -> Tensor:
    return torch.exp(-torch.cdist(x, y).square() / (2 * _SIGMA**2))


def _mmd(xx: Tensor, yy: Tensor, xy: Tensor) -> float:
    n, m = len(xx), len(yy)
    within = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    return float(within - 2 * xy.mean())


def _check(one: Tensor, two: Tensor) -> None:
    for features in (one, two):
        if len(features) < 2:
            raise DQError(f"a distance needs at least 2 images on each side, not {len(features)}")
    if one.shape[1] != two.shape[1]:
        raise DQError(
            f"features of {one.shape[1]} and of {two.shape[1]} dimensions cannot be compared; "
            "use the extractor that the reference was made with"
        )
