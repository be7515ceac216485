"""What a way to compute block-sparse attention is, and which there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from dq.kernels.live_blocks import LiveBlocks
from dq.registry import Registry

__all__ = ["FLOAT", "Operands", "Way", "ways"]


class Operands(NamedTuple):
    """Formats of the operands, whose scales are those of blocks; None leaves one in floating point.

    Attributes:
        query_key: Of q and k, with a scale a block each; k without its mean over the tokens, which
            no softmax sees.
        value: Of v, with a scale for each feature of a block of keys.
        probabilities: Of p, below the largest one so far: integers with a scale a block, floating
            point with 1 at its largest level.
    """

    query_key: str | None = None
    value: str | None = None
    probabilities: str | None = None


FLOAT = Operands()


@dataclass(frozen=True)
class Way:
    """One way to compute it.

    Args:
        path: What it computes, in words.
        devices: Types of devices that it is for.
        serves: Whether it takes these operands and blocks; see `run`.
        run: Returns `softmax(scale * q k^T) v` over the live blocks, `(B, H, N, D)` in the dtype of
            the operands, of q, k and v `(B, H, N, D)`.
        rank: Of the ways that serve, the one of the lowest rank is taken; those without one are
            taken only if they are asked for.
    """

    path: str
    devices: tuple[str, ...]
    serves: Callable[[Tensor, Tensor, Tensor, LiveBlocks, Operands], bool]
    run: Callable[[Tensor, Tensor, Tensor, float, LiveBlocks, Operands], Tensor]
    rank: int | None = None


ways: Registry[Way] = Registry("way of block-sparse attention", home="dq.kernels.block_sparse")
