"""Weights that round to the nearest level to what another rounding has chosen for them."""

from __future__ import annotations

import torch
from torch import Tensor

from dq.rounding.grid import between
from dq.scales import Scales
from dq.spec import TensorSpec

__all__ = ["within_cells"]

_EDGE = 0.02  # of a cell: so near to a tie, float32 could round to the other side


def within_cells(weight: Tensor, codes: Tensor, scales: Scales, spec: TensorSpec) -> Tensor:
    """Return a matrix whose nearest levels are given codes.

    Each weight lies as far between the ends of its code's cell as it lay between its two levels. On
    integers that is w + step * (1[rounded up] - 1/2), which takes the learned offsets of AdaRound
    into the weight itself; other codes, as of GPTQ, are whole levels farther off.

    Args:
        weight: `(N, K)` floating point.
        codes: `(N, K)` uint8.
        scales: Of the weight.
        spec: How it is quantized.

    Returns:
        `(N, K)` float32.
    """
    grid = spec.grid
    below, above, share, step, zeros = between(weight, scales, spec)
    share = torch.where(above > below, share, 0.5)
    share = share.clamp(_EDGE, 1 - _EDGE)
    levels = grid.levels.to(weight.device)
    index = torch.searchsorted(levels, grid.decode(codes))
    middles = (levels[1:] + levels[:-1]) / 2
    first, last = 2 * levels[:1] - middles[:1], 2 * levels[-1:] - middles[-1:]
    ends = torch.cat([first, middles, last])
    low, high = ends[index], ends[index + 1]
    return (low + share * (high - low) - zeros) * step
