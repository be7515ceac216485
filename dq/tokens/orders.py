"""Orders of the tokens of a grid, by name.

| name        | the order                                                                        |
|-------------|----------------------------------------------------------------------------------|
| `"hw"`      | row by row, as models have it; of videos `"fhw"`                                 |
| `"wh"`      | column by column; every other order of the axes likewise, the last runs fastest  |
| `"tile8x8"` | tile by tile, each row by row; of videos `"tile4x4x4"`                           |

Orders of axes are those of PAROAttention (Zhao et al. 2025, arXiv 2506.16054): a head that attends
along one axis has its large values in blocks once that axis runs fastest. Tiles are an extension
beyond it, for heads that attend to whatever is near.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from dq.errors import DQError

__all__ = ["TILES", "candidates", "natural", "places"]

_AXES = {2: "hw", 3: "fhw"}
_TILE = re.compile(r"tile(\d+(?:x\d+)+)")

TILES = {2: ("tile8x8",), 3: ("tile4x4x4", "tile1x8x8", "tile8x2x4")}
"""Tile orders that are tried where they are wished for, by the number of axes."""


def natural(grid: Sequence[int]) -> str:
    """Return the name of the order that tokens have anyway."""
    return _AXES[len(grid)]


def candidates(grid: Sequence[int], tiles: bool = False) -> tuple[str, ...]:
    """Return the names of the orders that a head may choose from; the natural one is the first.

    Args:
        grid: Of the image tokens. Axes of length 1 are not moved.
        tiles: Whether tile orders are among them.
    """
    axes = _AXES[len(grid)]
    moved = [axis for axis, size in zip(axes, grid, strict=True) if size > 1]
    orders = []
    for wanted in itertools.permutations(moved):
        left = iter(wanted)
        orders.append("".join(next(left) if axis in moved else axis for axis in axes))
    return (*orders, *(TILES[len(grid)] if tiles else ()))


def places(order: str, grid: Sequence[int]) -> Tensor:
    """Return which token comes to each place.

    Args:
        order: A name of the table above.
        grid: (height, width) or (frames, height, width).

    Returns:
        `(n,)` int64, each of the n tokens of the grid once.

    Raises:
        DQError: If there is no such order of a grid of so many axes.
    """
    axes = _AXES[len(grid)]
    tokens = torch.arange(math.prod(grid)).view(*grid)
    if sorted(order) == sorted(axes):
        return tokens.permute([axes.index(axis) for axis in order]).flatten()
    found = _TILE.fullmatch(order)
    tile = [int(size) for size in found[1].split("x")] if found else []
    if len(tile) != len(grid) or min(tile) < 1:
        raise DQError(
            f"unknown order {order!r} of a grid of {len(grid)} axes; known: the axes "
            f"{axes!r} in any order, and tiles such as {TILES[len(grid)][0]!r}"
        )
    where = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    outer = _numbers([w // t for w, t in zip(where, tile, strict=True)])
    inner = _numbers([w % t for w, t in zip(where, tile, strict=True)])
    return (outer * (int(inner.max()) + 1) + inner).flatten().argsort()


def _numbers(where: Sequence[Tensor]) -> Tensor:
    """Return a number for each combination of coordinates, ascending in their order."""
    number = torch.zeros_like(where[0])
    for axis in where:
        number = number * (int(axis.max()) + 1) + axis
    return number
