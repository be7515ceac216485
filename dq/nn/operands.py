"""Attention with quantized operands, simulated in floating point and differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from dq.attention_spec import AttentionSpec
from dq.formats import FloatFormat
from dq.kernels.live_blocks import LiveBlocks
from dq.nn.quantizer import Quantizer
from dq.spec import Granularity, TensorSpec

__all__ = ["block_quantized_attention", "quantized_attention"]


def quantized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    spec: AttentionSpec,
    mask: Tensor | None = None,
) -> Tensor:
    """Return `softmax(scale * q k^T + mask) v` with operands rounded as the spec says.

    Takes memory for all scores at once.

    Args:
        q: `(B, H, N, D)`.
        k: `(B, H, M, D)`.
        v: `(B, H, M, E)`.
        scale: Of the scores.
        spec: How operands are quantized.
        mask: `(..., N, M)`: bool, where False hides a key, or floating point that is added.

    Returns:
        `(B, H, N, E)` in the dtype of `v`.
    """
    scores = (_rounded(q, spec.query_key, -1) @ _rounded(k, spec.query_key, -1).mT) * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask.float()
    probabilities = _rounded(scores.softmax(-1), spec.probabilities, -1)
    return (probabilities @ _rounded(v, spec.value, -2)).to(v.dtype)


def block_quantized_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, spec: AttentionSpec, blocks: LiveBlocks
) -> Tensor:
    """Return the attention of live blocks with operands rounded block by block.

    It goes through the blocks of keys in their order with a running maximum, as kernels do, and so
    says what they compute: probabilities are rounded below the maximum so far, and the sums they
    are divided by are of those that are not rounded.

    Args:
        q: `(B, H, N, D)`.
        k: `(B, H, N, D)`.
        v: `(B, H, N, D)`.
        scale: Of the scores.
        spec: How operands are quantized, by block.
        blocks: Order of the tokens, and which blocks count.

    Returns:
        `(B, H, N, D)` in the dtype of `v`.
    """
    size, width = blocks.block
    there = blocks.there.unflatten(1, (-1, width))  # (H, k, width)
    smooth = k.float() - k.float().mean(2, keepdim=True)
    queries = blocks.moved(q.float()).unflatten(2, (-1, size))  # (B, H, q, size, D)
    keys, values = (blocks.moved(x).unflatten(2, (-1, width)) for x in (smooth, v.float()))
    mask = there[:, :, :, None]
    keys, values = keys * mask, values * mask  # what pads a block must not be in its scale
    queries = queries * blocks.there.unflatten(1, (-1, size))[..., None]
    queries, keys = (_of_blocks(x, spec.query_key) for x in (queries, keys))
    values = _of_blocks(values.mT, spec.value, rows=4).mT
    top = queries.new_full((*queries.shape[:4], 1), -torch.inf)
    total, out = torch.zeros_like(top), torch.zeros_like(queries)
    for block in range(keys.shape[2]):
        live = (blocks.live[:, :, block, None] & there[:, None, block])[:, :, None]
        scores = queries @ keys[:, :, block, None].mT * scale
        scores = scores.masked_fill(~live, -torch.inf)
        higher = torch.maximum(top, scores.amax(-1, keepdim=True))
        known = higher.isfinite()
        fresh = torch.where(known, (scores - higher).exp(), 0)
        before = torch.where(known, (top - higher).exp(), 0)
        rounded = _below_one(fresh, spec.probabilities)
        total = total * before + fresh.sum(-1, keepdim=True)
        out = out * before + rounded @ values[:, :, block, None]
        top = higher
    return blocks.restored((out / total).flatten(2, 3)).to(v.dtype)


def _of_blocks(x: Tensor, spec: TensorSpec | None, rows: int = 3) -> Tensor:
    """Fake-quantize with a scale for everything behind the first `rows` dimensions."""
    if spec is None:
        return x
    row = TensorSpec(spec.format, Granularity("token"), dynamic=True)
    return Quantizer(row)(x.reshape(x.shape[:rows].numel(), -1)).view(x.shape)


def _below_one(p: Tensor, spec: TensorSpec | None) -> Tensor:
    """Fake-quantize probabilities; floats with 1 at their largest level, they need no other."""
    if spec is None or not isinstance(spec.grid, FloatFormat):
        return _of_blocks(p, spec)
    return spec.grid.round(p * spec.grid.high) / spec.grid.high


def _rounded(x: Tensor, spec: TensorSpec | None, first: int) -> Tensor:
    """Fake-quantize with a scale for everything from dimension `first` on; float32."""
    if spec is None:
        return x.float()
    return Quantizer(spec)(x.reshape(x.shape[:first].numel(), -1)).view(x.shape)
