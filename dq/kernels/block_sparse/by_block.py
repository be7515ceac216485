"""Operands rounded block by block, in plain torch: what defines the kernels that compute with them.

It goes through the blocks of keys in their order with a running maximum, as kernels do:
probabilities are rounded below the largest so far, and the sums that outputs are divided by are of
those that are not rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dq.formats import FloatFormat, formats
from dq.kernels.block_sparse.way import Operands, Way, ways
from dq.kernels.live_blocks import LiveBlocks
from dq.quantize import straight_through

__all__ = ["BY_BLOCK", "smoothed"]

_LEAST = 1e-12  # scale of a block of zeros


def smoothed(k: Tensor) -> Tensor:
    """Return keys `(B, H, N, D)` without their mean over the tokens, float32.

    It moves all scores of a query by the same (SageAttention, Zhang et al. 2024, arXiv 2410.02367,
    section 4.2).
    """
    return k.float() - k.float().mean(2, keepdim=True)


def _rounded(x: Tensor, name: str | None, first: int) -> Tensor:
    """Round to a format with a scale for everything from dimension `first` on, straight through."""
    if name is None:
        return x
    grid, dims = formats[name], tuple(range(first, x.dim()))
    scale = x.detach().abs().amax(dims, keepdim=True).clamp_min(_LEAST) / grid.high
    return straight_through(x, grid.round(x.detach() / scale) * scale)


def _below_one(p: Tensor, name: str | None) -> Tensor:
    """Round probabilities, of one block a query block and image."""
    if name is None or not isinstance(formats[name], FloatFormat):
        return _rounded(p, name, 3)
    grid = formats[name]
    return straight_through(p, grid.round(p.detach() * grid.high) / grid.high)


def _run(
    q: Tensor, k: Tensor, v: Tensor, scale: float, blocks: LiveBlocks, operands: Operands
) -> Tensor:
    size, width = blocks.block
    there = blocks.there.unflatten(1, (-1, width))  # (H, k, width)
    queries = blocks.moved(q.float()).unflatten(2, (-1, size))  # (B, H, q, size, D)
    keys, values = (
        blocks.moved(x).unflatten(2, (-1, width)) * there[..., None]  # padding has no scale
        for x in (smoothed(k), v.float())
    )
    queries = queries * blocks.there.unflatten(1, (-1, size))[..., None]
    queries, keys = (_rounded(x, operands.query_key, 3) for x in (queries, keys))
    values = _rounded(values.mT, operands.value, 4).mT
    top = queries.new_full((*queries.shape[:4], 1), -torch.inf)
    total, out = torch.zeros_like(top), torch.zeros_like(queries)
    for block in range(keys.shape[2]):
        live = (blocks.live[:, :, block, None] & there[:, None, block])[:, :, None]
        scores = queries @ keys[:, :, block, None].mT * scale
        scores = scores.masked_fill(~live, -torch.inf)
        higher = torch.maximum(top, scores.amax(-1, keepdim=True))
        base = higher.masked_fill(higher == -torch.inf, 0)  # rows that have not met a key yet
        fresh, before = (scores - base).exp(), (top - base).exp()
        total = total * before + fresh.sum(-1, keepdim=True)
        rounded = _below_one(fresh, operands.probabilities)
        out = out * before + rounded @ values[:, :, block, None]
        top = higher
    total = total.masked_fill(total == 0, 1)  # rows of places without a query
    return blocks.restored((out / total).flatten(2, 3)).to(v.dtype)


BY_BLOCK = ways.add(
    "by-block",
    Way(
        "simulated",
        ("cpu", "cuda", "mps", "xpu"),
        lambda q, k, v, blocks, operands: True,
        _run,
        rank=8,
    ),
)
