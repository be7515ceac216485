"""How the tokens of one attention are ordered, and which blocks of it are computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from dq.errors import DQError, check_known
from dq.packing import pack, packed_length, unpack
from dq.tokens.layout import TokenLayout
from dq.tokens.orders import places

__all__ = ["TokenSpec"]


@dataclass(frozen=True)
class TokenSpec:
    """An order of tokens for each head, and a block mask for each head and group of steps.

    It holds for one number of tokens only: those that it was found on. Which order a head has, and
    which of its blocks count, are tensors beside it.

    Args:
        layout: Of the tokens.
        heads: Number of heads.
        orders: Names of the orders that heads choose from by number.
        block: Queries and keys of a block; one is a multiple of the other.
        groups: Timesteps, ascending, each with masks; a call takes those of the nearest. Empty for
            the same masks at all.
    """

    layout: TokenLayout
    heads: int
    orders: tuple[str, ...]
    block: tuple[int, int] = (64, 64)
    groups: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise DQError(f"heads is 1 or more, not {self.heads}")
        small, large = sorted(self.block)
        if small < 1 or large % small:
            raise DQError(f"queries and keys of a block divide each other, not {self.block}")
        if not self.orders or len(self.orders) > 256:
            raise DQError(f"there are 1 to 256 orders, not {len(self.orders)}")
        for order in self.orders:
            places(order, self.layout.grid)  # says it if there is none of that name
        if list(self.groups) != sorted(set(self.groups)):
            raise DQError(f"groups are ascending timesteps, not {self.groups}")

    @property
    def unit(self) -> int:
        """Tokens that image and text are padded to a multiple of."""
        return max(self.block)

    @property
    def image_blocks(self) -> tuple[int, int]:
        """Blocks of image queries and of image keys; those of text are all computed."""
        return self._blocks_of(self.layout.image)

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks of all queries and of all keys."""
        parts = self._blocks_of(self.layout.image), self._blocks_of(self.layout.text)
        return parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]

    def _blocks_of(self, tokens: int) -> tuple[int, int]:
        """Return how many blocks of queries and of keys some tokens take, padded."""
        padded = tokens + -tokens % self.unit
        return padded // self.block[0], padded // self.block[1]

    def table(self, order: str) -> Tensor:
        """Return which token comes to each place, `(L,)` int32; see `TokenLayout.table`."""
        return self.layout.table(order, self.unit)

    @property
    def mask_shape(self) -> tuple[int, int, int]:
        """Shape of the packed masks: groups, heads, bytes."""
        queries, keys = self.image_blocks
        return max(len(self.groups), 1), self.heads, packed_length(queries * keys, 1)

    def unpacked(self, masks: Tensor) -> Tensor:
        """Return stored masks `(..., bytes)` uint8 as `(..., q, k)` bool, of the image's blocks."""
        queries, keys = self.image_blocks
        return unpack(masks, 1, queries * keys).bool().unflatten(-1, (queries, keys))

    def packed(self, masks: Tensor) -> Tensor:
        """Return masks `(..., q, k)` bool, of the image's blocks, as they are stored."""
        return pack(masks.flatten(-2).to(torch.uint8), 1)

    def bytes(self) -> int:
        """Return the bytes of orders and masks."""
        groups, heads, size = self.mask_shape
        return heads + groups * heads * size

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        values = dataclasses.asdict(self)
        return {**values, **{k: list(values[k]) for k in ("orders", "block", "groups")},
                "layout": {**values["layout"], "grid": list(self.layout.grid)}}  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Invert `to_dict`.

        Raises:
            DQError: For an unknown key, or a value that does not fit.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        check_known("key of a token spec", values, known)
        layout = dict(values["layout"])
        return cls(
            TokenLayout(tuple(layout.pop("grid")), **layout),
            values["heads"],
            tuple(values["orders"]),
            (values["block"][0], values["block"][1]),
            tuple(map(float, values.get("groups", ()))),
        )

    def __str__(self) -> str:
        steps = f", masks of {len(self.groups)} step groups" if self.groups else ""
        block = "x".join(map(str, self.block))
        return f"{self.layout} tokens in blocks of {block}, {'/'.join(self.orders)}{steps}"
