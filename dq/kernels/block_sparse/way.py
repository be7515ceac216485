"""What a way to compute block-sparse attention is, and which there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dq.kernels.live_blocks import LiveBlocks
from dq.registry import Registry

__all__ = ["Way", "ways"]


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
    serves: Callable[[Tensor, Tensor, Tensor, LiveBlocks], bool]
    run: Callable[[Tensor, Tensor, Tensor, float, LiveBlocks], Tensor]
    rank: int | None = None


ways: Registry[Way] = Registry("way of block-sparse attention", home="dq.kernels.block_sparse")
