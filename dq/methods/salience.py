"""Salience balancing: what large channels of inputs and of weights have in excess meets halfway.

PTQ4DiT (Wu et al. 2024, arXiv 2405.16005). Channel-wise salience balancing divides an input channel
by s = sqrt(X / W), where X and W are the largest magnitudes of the channel and of its weights, and
multiplies the weights: both then reach sqrt(X W). Salience calibration, guided by Spearman's rho,
makes the one X of all denoising steps,

    X = sum_t w_t max|X_t|,    w = softmax(-rho),

of which those weigh most whose large channels do not meet large weights, so that there is something
to balance. The rest of the paper, learned rounding and scales, is other steps' work.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dq.inputs import Seen
from dq.method import methods
from dq.methods.smoothquant import Smoothing

__all__ = ["Salience", "rank_correlation", "salience"]


def rank_correlation(x: Tensor, y: Tensor) -> Tensor:
    """Return Spearman's rho, 1 - 6 sum d^2 / (n (n^2 - 1)) with d the differences of ranks.

    Equal values are ranked in the order in which they stand, not all alike: among measured
    magnitudes they are rare. One value alone agrees with whatever it meets.

    Args:
        x: `(..., n)`.
        y: `(n,)`, or of the shape of `x`.

    Returns:
        `(...)` float64 in [-1, 1].
    """
    n = x.shape[-1]
    ranks = [v.argsort(dim=-1, stable=True).argsort(-1).double() for v in (x, y)]
    return 1 - 6 * (ranks[0] - ranks[1]).square().sum(-1) / max(n * (n * n - 1), 1)


def salience(by_step: Tensor, weights: Tensor) -> Tensor:
    """Return one magnitude of each input channel for all denoising steps.

    Args:
        by_step: `(T, C)` float32, the largest magnitude of each channel at each step.
        weights: `(C,)` float32, that of the weights that it meets.

    Returns:
        `(C,)` float32, between the smallest and the largest of the steps.
    """
    share = torch.softmax(-rank_correlation(by_step, weights), 0)
    return share.to(by_step.dtype) @ by_step


@methods.register("salience")
@dataclass(frozen=True)
class Salience(Smoothing):
    """Balance the magnitudes of input channels and their weights over all denoising steps.

    The paper leaves out the second layer of feed-forwards. Roles do not tell it from the first, so
    that this step looks at all of them unless it is told otherwise. Its square root is alpha = 0.5.
    """

    words = "salience balancing"

    def magnitudes(self, seen: Seen, weights: Tensor) -> Tensor:
        """Return the salience; see `Smoothing.magnitudes`."""
        return salience(seen.by_step, weights)
