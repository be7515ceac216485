"""Learned rounding by signs: each weight is pushed up or down, a little less at every step.

SignRound (Cheng et al. 2023, arXiv 2309.05516, algorithm 1), on any grid: a weight becomes the
level nearest to its place on the grid plus an offset of at most half the gap around it. Only the
sign of a gradient enters, so that the offsets need no scale and few steps are enough. The paper
learns clipping ranges beside the offsets; here scales stay, as with every rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dq.quantize import dequantize, quantize
from dq.rounding.grid import between
from dq.rounding.moment import check_finite
from dq.scales import Scales
from dq.spec import TensorSpec

__all__ = ["signed_rounding"]

_MOST = 0.5  # of the gap, by which a weight is moved: either level can be reached from anywhere


def signed_rounding(
    weight: Tensor,
    scales: Scales,
    spec: TensorSpec,
    moment: Tensor,
    steps: int = 200,
    rate: float = 0.0,
) -> Tensor:
    """Round a weight so that the output of its layer changes little.

    Rows are learned and kept by themselves: each has the best codes that it came by, those of
    round-to-nearest included.

    Args:
        weight: `(N, K)` floating point.
        scales: As chosen for `spec`; they stay.
        spec: How the weight is quantized.
        moment: `(K, K)` float32, E[x x^T] of the layer's inputs.
        steps: Of signed gradient descent.
        rate: Of the first step, as a share of the gap between two levels; later ones fall to 0 on a
            line. 0 for 1 / steps: all steps together then go as far as an offset may.

    Returns:
        `(N, K)` uint8 codes.

    Raises:
        DQError: If the moment is not finite.
    """
    check_finite(moment)
    weight = weight.detach().float()
    # Losses are only compared: in this unit they neither vanish nor overflow.
    moment = moment / moment.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    below, above, fraction, step, zeros = between(weight, scales, spec)
    down, up = ((level - zeros) * step - weight for level in (below, above))  # errors of each
    nearest = quantize(weight, scales, spec)
    error = dequantize(nearest, scales, spec) - weight
    slope = error @ moment
    least = (error * slope).sum(1, keepdim=True)
    moved = torch.zeros_like(least, dtype=torch.bool)
    best = torch.zeros_like(weight, dtype=torch.bool)
    offset = torch.zeros_like(weight)
    for index in range(steps):
        # Straight through the rounding, the gradient of trace(e M e^T) by an offset is 2 e M times
        # the gap, which is positive: its sign is that of e M.
        size = (rate or 1.0 / steps) * (1.0 - index / steps)
        offset.sub_(slope.sign_(), alpha=size).clamp_(-_MOST, _MOST)
        is_up = fraction + offset >= 0.5
        error = torch.where(is_up, up, down)
        slope = error @ moment
        loss = (error * slope).sum(1, keepdim=True)
        better = loss < least
        least = torch.where(better, loss, least)
        best = torch.where(better, is_up, best)
        moved |= better
    return torch.where(moved, spec.grid.encode(torch.where(best, above, below)), nearest)
