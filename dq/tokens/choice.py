"""Which order a head gets, and which blocks of its map are computed.

PAROAttention (Zhao et al. 2025, arXiv 2506.16054) leaves its calibration unpublished; two ways to
judge an order are here.

- `mass_kept`: the share of the probabilities that the largest blocks hold at the density asked for,
  which is what the mask then keeps. It has no constants.
- `paper_score`: alpha times the share of blocks that are not empty plus (1 - alpha) times the mean
  incoherence, max / mean of a block, both over their sum over all orders; the least is best. The
  paper prints the share of *empty* blocks in this place, with which the worst order would win; it
  gives no alpha. What counts as empty is measured in the mean probability instead of 0.001.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dq.tokens.statistics import Blocks

__all__ = ["RULES", "mass_kept", "paper_score", "threshold", "top"]

_HALVINGS = 40  # of the interval that holds a threshold
_EMPTY = 0.9  # share of next-to-nothing probabilities above which a block counts as empty
_FAINT = 1e-6  # of a row of blocks: below that a block has no incoherence to speak of


def mass_kept(sums: Tensor, density: float) -> Tensor:
    """Return the share of all probabilities that the largest blocks of each map hold.

    Args:
        sums: `(..., H, q, k)`, sums of blocks.
        density: Share of the blocks that may be kept.

    Returns:
        `(..., H)`.
    """
    flat = sums.flatten(-2)
    count = max(1, round(density * flat.shape[-1]))
    return flat.topk(count).values.sum(-1) / flat.sum(-1).clamp_min(1e-12)


def paper_score(blocks: Mapping[str, Blocks], size: int, alpha: float = 0.5) -> Tensor:
    """Return the score of each order for each head, the least is best.

    Args:
        blocks: By order, with extremes.
        size: Elements of a block.
        alpha: Weight of sparsity against incoherence.

    Returns:
        `(orders, H)`.
    """
    filled, rough = [], []
    for found in blocks.values():
        filled.append((found.small / size < _EMPTY).float().mean((0, 2, 3)))
        psi = found.maxima * size / found.sums.clamp_min(1e-30)
        seen = found.sums > _FAINT * found.sums.sum(-1, keepdim=True)
        rough.append((psi * seen).sum((0, 2, 3)) / seen.sum((0, 2, 3)).clamp_min(1))
    parts = [torch.stack(x) for x in (filled, rough)]
    sparse, quant = (x / x.sum(0).clamp_min(1e-12) for x in parts)
    return alpha * sparse + (1 - alpha) * quant


def top(sums: Sequence[Tensor], forced: Sequence[Tensor], density: float) -> list[Tensor]:
    """Keep the largest blocks of each map, as many for every head and group.

    Args:
        sums: By attention, `(G, H, q, k)`, sums of blocks.
        forced: By attention, `(q, k)` bool, blocks that are kept in any case.
        density: Share of the blocks of each map that are kept, those included.

    Returns:
        By attention, `(G, H, q, k)` bool.
    """
    masks = []
    for mine, always in zip(sums, forced, strict=True):
        count = max(0, round(density * always.numel()) - int(always.sum()))
        flat = mine.masked_fill(always, -1).flatten(-2)
        largest = flat.topk(count).indices
        kept = torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, largest, True)
        masks.append(kept.view(mine.shape) | always)
    return masks


def threshold(sums: Sequence[Tensor], forced: Sequence[Tensor], density: float) -> list[Tensor]:
    """Keep all blocks above one number for all maps, so that heads that spread out keep more.

    Takes and returns what `top` does; the density is that of all maps together.
    """
    total = sum(mine.numel() for mine in sums)

    def masks(least: float) -> list[Tensor]:
        return [(mine >= least) | always for mine, always in zip(sums, forced, strict=True)]

    def count(least: float) -> int:
        return sum(int(mask.sum()) for mask in masks(least))

    low, high = 0.0, 1.0 + max(float(mine.max()) for mine in sums)
    if count(low) <= density * total:
        return masks(low)
    for _ in range(_HALVINGS):  # a bisection: all sums in one list could be too much
        middle = (low + high) / 2
        low, high = (middle, high) if count(middle) > density * total else (low, middle)
    return masks(high)


RULES: Mapping[str, Callable[[Sequence[Tensor], Sequence[Tensor], float], list[Tensor]]] = {
    "threshold": threshold,
    "top": top,
}
"""Ways to choose blocks, by name."""
