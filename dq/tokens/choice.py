"""Which order a head gets, and which blocks of its map are computed.

PAROAttention (Zhao et al. 2025, arXiv 2506.16054) leaves its calibration unpublished; two ways to
judge an order are here.

- The mass that the mask keeps: the probabilities in its blocks. It has no constants, and depends on
  how blocks are chosen: `threshold` and `top` find orders and blocks together.
- `paper_score`: alpha times the share of blocks that are not empty plus (1 - alpha) times the mean
  incoherence, max / mean of a block, both over their sum over all orders; the least is best. The
  paper prints the share of *empty* blocks in this place, with which the worst order would win; it
  gives no alpha. What counts as empty is measured in the mean probability instead of 0.001.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dq.tokens.statistics import Blocks

__all__ = ["RULES", "Chosen", "in_orders", "mass_kept", "paper_score", "threshold", "top"]

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


class Chosen(NamedTuple):
    """What has been chosen for the heads of one attention.

    Attributes:
        orders: `(H,)` integers, which of the candidate orders each head has.
        masks: `(G, H, q, k)` bool, blocks of image queries and image keys that are computed, for G
            groups of steps.
    """

    orders: Tensor
    masks: Tensor


def in_orders(sums: Tensor, orders: Tensor) -> Tensor:
    """Return the sums of each head in its own order.

    Args:
        sums: `(O, G, H, q, k)`, of all candidates.
        orders: `(H,)`.

    Returns:
        `(G, H, q, k)`.
    """
    heads = torch.arange(sums.shape[2], device=sums.device)
    return sums[orders, :, heads].transpose(0, 1)


def top(sums: Sequence[Tensor], forced: Sequence[Tensor], density: float) -> list[Chosen]:
    """Keep the largest blocks of each map, as many for every head and group.

    Args:
        sums: By attention, `(O, G, H, q, k)`, sums of blocks in each of O orders.
        forced: By attention, `(q, k)` bool, blocks that are kept in any case.
        density: Share of the blocks of each map that are kept, those included.

    Returns:
        By attention; the order of a head is the one in which its blocks hold the most.
    """
    found = []
    for every, always in zip(sums, forced, strict=True):
        orders = mass_kept(every, density).mean(1).argmax(0)
        mine = in_orders(every, orders)
        count = max(0, round(density * always.numel()) - int(always.sum()))
        flat = mine.masked_fill(always, -1).flatten(-2)
        largest = flat.topk(count).indices
        kept = torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, largest, True)
        found.append(Chosen(orders, kept.view(mine.shape) | always))
    return found


def threshold(sums: Sequence[Tensor], forced: Sequence[Tensor], density: float) -> list[Chosen]:
    """Keep all blocks above one number for all maps, so that heads that spread out keep more.

    A head's order is judged by that number too, and not by what the head would keep at a density
    that it does not get: each takes the best for mass less the number times blocks (Lagrange), so
    that together they hold the most in so many blocks, up to the few by which a head's change of
    order makes their count jump.

    Takes and returns what `top` does; the density is that of all maps together.
    """
    orders = [found.orders for found in _at_density(sums, forced, density)]
    mine = [in_orders(every, each)[None] for every, each in zip(sums, orders, strict=True)]
    filled = _at_density(mine, forced, density)  # no head can change now: the count does not jump
    return [Chosen(each, found.masks) for each, found in zip(orders, filled, strict=True)]


def _at_density(sums: Sequence[Tensor], forced: Sequence[Tensor], density: float) -> list[Chosen]:
    """Keep the blocks above the least number that leaves no more than the density."""
    most = density * sum(every[0].numel() for every in sums)

    def at(least: float) -> list[Chosen]:
        return [_above(every, always, least) for every, always in zip(sums, forced, strict=True)]

    def count(found: Sequence[Chosen]) -> int:
        return sum(int(each.masks.sum()) for each in found)

    low, high = 0.0, 1.0 + max(float(every.max()) for every in sums)
    if count(found := at(low)) <= most:
        return found
    for _ in range(_HALVINGS):  # a bisection: all sums in one list could be too much
        middle = (low + high) / 2
        low, high = (middle, high) if count(at(middle)) > most else (low, middle)
    return at(high)


def _above(sums: Tensor, always: Tensor, least: float) -> Chosen:
    """Keep the blocks above a number, in the order of each head in which they exceed it most."""
    worth = torch.where(always, sums, (sums - least).clamp_min(0))
    orders = worth.sum((1, 3, 4)).argmax(0)
    return Chosen(orders, (in_orders(sums, orders) >= least) | always)


RULES: Mapping[str, Callable[[Sequence[Tensor], Sequence[Tensor], float], list[Chosen]]] = {
    "threshold": threshold,
    "top": top,
}
"""Ways to choose orders and blocks, by name."""
