"""Which blocks of an attention are computed, and in which order its tokens lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["LiveBlocks"]

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class LiveBlocks:
    """An order and a block mask for each head; the same for all images of a batch.

    Args:
        table: `(H, L)` int32, which token comes to each place of a head; -1 for none. Every token
            comes to one.
        live: `(H, q, k)` bool, the blocks that are computed; every row of blocks in which there is
            a query has one in which there is a key.
        block: Queries and keys of a block: L is q times the one, k times the other.
    """

    table: Tensor
    live: Tensor
    block: tuple[int, int]

    @cached_property
    def lists(self) -> tuple[Tensor, Tensor]:
        """Numbers of the live blocks of each row of blocks.

        Returns:
            How many there are, `(H, q)` int32; and which, `(H, q, k)` int32, ascending, the others
            after them.
        """
        counts = self.live.sum(-1, dtype=torch.int32)
        return counts, (~self.live).int().argsort(stable=True, dim=-1).int().contiguous()

    @cached_property
    def whole(self) -> bool:
        """Whether every block is live."""
        return bool(self.live.all())

    @cached_property
    def gather(self) -> Tensor:
        """Which token is read for each place, `(H, L)` int64; any where there is none."""
        return self.table.clamp_min(0).long()

    @cached_property
    def there(self) -> Tensor:
        """Whether a token is at each place, `(H, L)` bool."""
        return self.table >= 0

    @cached_property
    def back(self) -> Tensor:
        """At which place each token lies, `(H, N)` int64."""
        order = torch.where(self.there, self.table, self.table.shape[1]).argsort(-1)
        return order[:, : int(self.there[0].sum())]

    @property
    def mask(self) -> Tensor:
        """Which keys each query sees, by places, `(H, L, L)` bool; at least one."""
        queries, keys = self.block
        mask = self.live.repeat_interleave(queries, 1).repeat_interleave(keys, 2)
        mask = mask & self.there[:, None, :]
        mask[:, :, 0] |= ~mask.any(-1)  # rows without a query: nothing of them is read
        return mask

    def kept(self, name: str, make: Callable[[LiveBlocks], T]) -> T:
        """Return what a kernel has made of these blocks, made once."""
        if name not in self._made:
            self._made[name] = make(self)
        found: T = self._made[name]
        return found

    @cached_property
    def _made(self) -> dict[str, Any]:
        return {}

    @property
    def density(self) -> float:
        """Share of the blocks that are computed."""
        return float(self.live.float().mean())

    def moved(self, x: Tensor) -> Tensor:
        """Return operands `(B, H, N, D)` at their places, `(B, H, L, D)`."""
        return x[:, torch.arange(x.shape[1], device=x.device)[:, None], self.gather]

    def restored(self, y: Tensor) -> Tensor:
        """Return outputs `(B, H, L, D)` at their tokens, `(B, H, N, D)`."""
        return y[:, torch.arange(y.shape[1], device=y.device)[:, None], self.back]
