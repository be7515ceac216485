"""The chooser: one way for each call, by device, dtype, block and formats."""

from __future__ import annotations

from torch import Tensor

from dq.errors import DQError
from dq.kernels.block_sparse.way import FLOAT, Operands, Way, ways
from dq.kernels.live_blocks import LiveBlocks

__all__ = ["block_sparse_attention", "path"]


def _chosen(
    q: Tensor, k: Tensor, v: Tensor, blocks: LiveBlocks, operands: Operands, asked: str
) -> Way:
    device = q.device.type
    if asked != "auto":
        way = ways[asked]
        if device not in way.devices or not way.serves(q, k, v, blocks, operands):
            few = "" if operands == FLOAT else f" rounded to {', '.join(map(str, operands))}"
            raise DQError(
                f"block-sparse attention by {asked!r} does not take {q.dtype} operands{few} on "
                f"{device} in blocks of {blocks.block[0]}x{blocks.block[1]}; use 'auto'"
            )
        return way
    ranked = sorted(
        ((way.rank, name, way) for name, way in ways.items() if way.rank is not None),
        key=lambda entry: entry[:2],
    )
    for _, _, way in ranked:
        if device in way.devices and way.serves(q, k, v, blocks, operands):
            return way
    raise DQError(f"no way of block-sparse attention for {q.dtype} operands on {device}")


def path(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: LiveBlocks,
    operands: Operands = FLOAT,
    asked: str = "auto",
) -> str:
    """Return in words what is really computed; arguments as in `block_sparse_attention`."""
    return _chosen(q, k, v, blocks, operands, asked).path


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    blocks: LiveBlocks,
    operands: Operands = FLOAT,
    asked: str = "auto",
) -> Tensor:
    """Return `softmax(scale * q k^T) v`, the softmax over the keys of live blocks.

    Args:
        q: `(B, H, N, D)`.
        k: `(B, H, N, D)`.
        v: `(B, H, N, D)`.
        scale: Positive.
        blocks: Order and mask of N tokens.
        operands: Formats that they are rounded to.
        asked: Name of a way, or "auto".

    Returns:
        `(B, H, N, D)` in the dtype of the operands, at the tokens' own places.

    Raises:
        DQError: If the way that is asked for does not take these operands.
    """
    return _chosen(q, k, v, blocks, operands, asked).run(q, k, v, scale, blocks, operands)
