"""Distances by kernel two-sample tests: KID and CMMD. Unbiased, hence fit for few images.

Both are estimates of the squared maximum mean discrepancy (Gretton et al. 2012, lemma 6)

    MMD² = mean k(x, x') + mean k(y, y') - 2 mean k(x, y),    x != x', y != y'

Sets that belong together pair by pair, such as images of the same seeds, are not independent: there
the last mean leaves out the pairs as well (the paper's equation 4). Else close sets seem closer
than equal ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dq.errors import DQError
from dq.eval.features import check_dimensions

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
    one: Tensor,
    two: Tensor,
    subset: int = 1000,
    subsets: int = 100,
    seed: int = 0,
    paired: bool = False,
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
        paired: Whether image i of both sets belongs together.

    Returns:
        The mean over the subsets and its standard error. Subsets that hold all images are equal:
        then the error comes from leaving out one block of images at a time.

    Raises:
        DQError: If there are fewer than two of either, or their dimensions differ.
    """
    _check(one, two, paired)
    size = min(subset, len(one), len(two))
    if size == len(one) == len(two):
        return _jackknife(one.double(), two.double(), paired)
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        chosen = [torch.randperm(len(f), generator=generator)[:size] for f in (one, two)]
        if paired:
            chosen[1] = chosen[0]
        x, y = (f[rows].double() for f, rows in zip((one, two), chosen, strict=True))
        values.append(_mmd(_cubic(x, x), _cubic(y, y), _cubic(x, y), paired))
    found = torch.tensor(values, dtype=torch.float64)
    return Estimate(float(found.mean()), float(found.std() / subsets**0.5))


def _jackknife(x: Tensor, y: Tensor, paired: bool, blocks: int = 10) -> Estimate:
    """Estimate once with all images, and the error with each block left out (Tukey 1958)."""
    xx, yy, xy = _cubic(x, x), _cubic(y, y), _cubic(x, y)
    whole = _mmd(xx, yy, xy, paired)
    count = min(blocks, len(x) // 2)
    if count < 2:
        return Estimate(whole, float("nan"))
    group = torch.arange(len(x)) * count // len(x)
    left = []
    for block in range(count):
        keep = (group != block).nonzero().flatten()
        a, b, c = (m[keep][:, keep] for m in (xx, yy, xy))
        left.append(_mmd(a, b, c, paired))
    values = torch.tensor(left, dtype=torch.float64)
    spread = (values - values.mean()).square().sum() * (count - 1) / count
    return Estimate(whole, float(spread.sqrt()))


def cmmd(one: Tensor, two: Tensor, paired: bool = False) -> float:
    """Return the CLIP maximum mean discrepancy, times 1000.

    Jayasumana et al., "Rethinking FID" (arXiv 2401.09603): a Gaussian kernel of width 10 on CLIP
    embeddings of length 1.

    Args:
        one: `(N, d)` embeddings of any length.
        two: `(M, d)` likewise.
        paired: Whether image i of both sets belongs together.

    Raises:
        DQError: If there are fewer than two of either, or their dimensions differ.
    """
    _check(one, two, paired)
    x, y = (torch.nn.functional.normalize(f.double(), dim=1) for f in (one, two))
    means = []
    for a, b, apart in ((x, x, True), (y, y, True), (x, y, paired)):
        total = sum(float(_gauss(part, b).sum()) for part in a.split(_STRIP))
        left_out = float(_gauss_of(a, b).sum()) if apart else 0.0
        means.append((total - left_out) / (len(a) * (len(b) - apart)))
    return 1000 * (means[0] + means[1] - 2 * means[2])


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _gauss(x: Tensor, y: Tensor) -> Tensor:
    return torch.exp(-torch.cdist(x, y).square() / (2 * _SIGMA**2))


def _gauss_of(x: Tensor, y: Tensor) -> Tensor:
    """Return the kernel of pairs, `(N,)`."""
    return torch.exp(-(x - y).square().sum(1) / (2 * _SIGMA**2))


def _mmd(xx: Tensor, yy: Tensor, xy: Tensor, paired: bool) -> float:
    within = sum((m.sum() - m.trace()) / (len(m) * (len(m) - 1)) for m in (xx, yy))
    n = len(xy)
    between = (xy.sum() - xy.trace()) / (n * (n - 1)) if paired else xy.mean()
    return float(within - 2 * between)


def _check(one: Tensor, two: Tensor, paired: bool) -> None:
    for features in (one, two):
        if len(features) < 2:
            raise DQError(f"a distance needs at least 2 images on each side, not {len(features)}")
    check_dimensions(one.shape[1], two.shape[1])
    if paired and len(one) != len(two):
        raise DQError(f"{len(one)} images cannot be paired with {len(two)}")
