"""What candidate orders make of attention maps, block by block, without ever holding a map.

A map of N queries and N keys is made a few queries at a time and reduced at once, for all orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dq.tokens.layout import TokenLayout

__all__ = ["BlockStatistics", "Blocks"]

_VALUES = 1 << 24  # of a map at a time: 64 MB
_SMALL = 17.5  # over N, next to nothing: the paper's 0.001 at its 17,550 tokens


class Blocks(NamedTuple):
    """Means over maps of what is in their blocks, image queries by image keys.

    Attributes:
        sums: `(G, H, q, k)` float32, for G groups of steps: the probabilities of a block, added up.
            Those of a row of blocks add up to its queries, less what falls on text.
        maxima: Likewise, the largest probability.
        small: Likewise, the number of probabilities that are next to nothing.
    """

    sums: Tensor
    maxima: Tensor
    small: Tensor


class BlockStatistics:
    """Takes in the operands of attention calls, and says what is in the blocks of their maps.

    Args:
        layout: Of the tokens.
        orders: Candidates, by name.
        block: Queries and keys of a block.
        groups: G, of denoising steps, kept apart.
        extremes: Whether maxima and small values are looked at, which only the score of the paper
            needs; they are zero otherwise.
    """

    def __init__(
        self,
        layout: TokenLayout,
        orders: Sequence[str],
        block: tuple[int, int],
        groups: int = 1,
        extremes: bool = False,
    ) -> None:
        self.layout, self.block, self.groups, self.extremes = layout, block, groups, extremes
        self._length = layout.image + -layout.image % max(block)
        # Which image token comes to each place, -1 for none.
        self._tables = {o: layout.table(o, max(block))[: self._length].long() for o in orders}
        self._totals: dict[str, Blocks] = {}
        self._maps = torch.zeros(groups)

    def blocks(self, order: str) -> Blocks:
        """Return what was found for an order; groups that no call was in are zero."""
        each = self._maps.clamp_min(1).view(-1, 1, 1, 1)
        total = self._totals[order]
        each = each.to(total.sums.device)
        if not self.extremes:
            return total._replace(sums=total.sums / each)
        return Blocks(*(t / each for t in total))

    @torch.no_grad()
    def add(self, q: Tensor, k: Tensor, scale: float, group: int = 0) -> None:
        """Take in the maps of one call; rows of a batch count alike.

        Args:
            q: `(B, H, N, D)`.
            k: `(B, H, N, D)`.
            scale: Of the scores.
            group: Of the call's step.
        """
        if not self._totals:
            shape = self.groups, q.shape[1], *(self._length // size for size in self.block)
            self._totals = {order: self._empty(shape, q.device) for order in self._tables}
            self._tables = {order: table.to(q.device) for order, table in self._tables.items()}
        rows = {order: self._homes(table, self.block[0]) for order, table in self._tables.items()}
        columns = {order: self._members(table) for order, table in self._tables.items()}
        for image in range(len(q)):
            self._map(q[image].float() * scale, k[image].float().mT, group, rows, columns)
        self._maps[group] += len(q)

    def _empty(self, shape: tuple[int, ...], device: torch.device) -> Blocks:
        """Return zeros; those that nobody will add to take no memory."""
        sums = torch.zeros(shape, device=device)
        if self.extremes:
            return Blocks(sums, torch.zeros_like(sums), torch.zeros_like(sums))
        nothing = torch.zeros((), device=device).expand(shape)
        return Blocks(sums, nothing, nothing)

    def _map(
        self, q: Tensor, k: Tensor, group: int, rows: dict[str, Tensor], columns: dict[str, Tensor]
    ) -> None:
        """Take in one map, of queries `(H, N, D)` and keys `(H, D, N)`."""
        heads, tokens, _ = q.shape
        every, widths = torch.cat([*columns.values()], 1), [m.shape[1] for m in columns.values()]
        kept = self._totals.items() if self.extremes else ()
        highest = {order: torch.zeros_like(t.maxima[group]) for order, t in kept}
        size = max(1, _VALUES // (heads * tokens))
        for start in range(0, tokens, size):
            part = slice(start, start + size)
            map = (q[:, part] @ k).softmax(-1)
            sums = (map @ every).split(widths, -1)
            for order, found in zip(self._tables, sums, strict=True):
                home = rows[order][part]
                mine, total = home >= 0, self._totals[order]  # text queries have no place here
                total.sums[group].index_add_(1, home[mine], found[:, mine])
                if self.extremes:
                    few = (map[:, mine] < _SMALL / tokens).float() @ columns[order]
                    total.small[group].index_add_(1, home[mine], few)
                    top = self._largest(map[:, mine], self._tables[order])
                    places = home[mine][None, :, None].expand_as(top)
                    highest[order].scatter_reduce_(1, places, top, "amax")
        for order, found in highest.items():
            self._totals[order].maxima[group].add_(found)

    def _largest(self, map: Tensor, table: Tensor) -> Tensor:
        """Return the largest probability of each block of keys, `(H, n, k)`."""
        moved = map[..., table.clamp_min(0)].masked_fill(table < 0, 0)
        return moved.unflatten(-1, (-1, self.block[1])).amax(-1)

    def _homes(self, table: Tensor, size: int) -> Tensor:
        """Return the number of the block that each token comes to, `(N,)`; -1 for text."""
        home = table.new_full((self.layout.tokens,), -1)
        there = (table >= 0).nonzero().squeeze(1)
        home[table[there]] = there // size
        return home

    def _members(self, table: Tensor) -> Tensor:
        """Return which block of keys each token is in, `(N, k)` of 0 and 1."""
        home, size = self._homes(table, self.block[1]), self.block[1]
        return F.one_hot(home + 1, self._length // size + 1)[:, 1:].float()
