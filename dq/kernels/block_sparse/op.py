"""The whole of it as one opaque operator, for `torch.compile`: from stored masks to outputs."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable

import torch
from torch import Tensor

from dq.kernels.block_sparse.choice import block_sparse_attention
from dq.kernels.block_sparse.way import Operands
from dq.kernels.live_blocks import LiveBlocks
from dq.tokens.spec import TokenSpec

__all__ = ["attend_by_group", "live_blocks", "ordered_attention"]


@functools.lru_cache(maxsize=64)
def _tables(spec: TokenSpec, device: torch.device) -> Tensor:
    """Return which token comes to each place in each order, `(orders, L)` int32."""
    return torch.stack([spec.table(order) for order in spec.orders]).to(device)


def live_blocks(spec: TokenSpec, orders: Tensor, masks: Tensor, group: int) -> LiveBlocks:
    """Return order and mask of all heads in a step group.

    Args:
        spec: Of the tokens.
        orders: `(H,)` uint8, which of the spec's orders each head has.
        masks: `(G, H, bytes)` uint8, packed; see `TokenSpec.unpacked`.
        group: Which masks.
    """
    table = _tables(spec, orders.device)[orders.long()].contiguous()
    queries, keys = spec.blocks
    live = torch.ones(spec.heads, queries, keys, dtype=torch.bool, device=masks.device)
    image_queries, image_keys = spec.image_blocks
    live[:, :image_queries, :image_keys] = spec.unpacked(masks[group])
    return LiveBlocks(table, live, spec.block)


def attend_by_group(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: int | Tensor,
    attend: Callable[[Tensor, Tensor, Tensor, int], Tensor],
) -> Tensor:
    """Return an attention whose images are in different step groups, each with its masks.

    Args:
        q: `(B, H, N, D)`.
        k: `(B, H, N, D)`.
        v: `(B, H, N, D)`.
        group: Of all images; or `(B,)` or `(1,)` int64.
        attend: Computes it for those of one group.
    """
    if isinstance(group, int):
        return attend(q, k, v, group)
    images = group.expand(len(q)) if len(group) == 1 else group
    first = int(images[0])
    if bool((images == first).all()):
        return attend(q, k, v, first)
    out = torch.empty_like(q)
    for each in images.unique().tolist():
        mine = images == each
        out[mine] = attend(q[mine], k[mine], v[mine], each)
    return out


def _layout(q: Tensor) -> Tensor:
    """Return an empty output: the heads of a token side by side, as layers after it want them."""
    batch, heads, tokens, depth = q.shape
    return q.new_empty(batch, tokens, heads, depth).transpose(1, 2)


torch.library.define(
    "dq::ordered_attention",
    "(Tensor q, Tensor k, Tensor v, float scale, Tensor orders, Tensor masks, Tensor group, "
    "str spec, str[] formats) -> Tensor",
)


@functools.lru_cache(maxsize=64)
def _read(spec: str) -> TokenSpec:
    return TokenSpec.from_dict(json.loads(spec))


@torch.library.impl("dq::ordered_attention", ("cpu", "cuda"))
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    orders: Tensor,
    masks: Tensor,
    group: Tensor,
    spec: str,
    formats: list[str],
) -> Tensor:
    operands = Operands(*(name or None for name in formats))

    def attend(q: Tensor, k: Tensor, v: Tensor, group: int) -> Tensor:
        blocks = live_blocks(_read(spec), orders, masks, group)
        return block_sparse_attention(q, k, v, scale, blocks, operands)

    return _layout(q).copy_(attend_by_group(q, k, v, group, attend))


@torch.library.register_fake("dq::ordered_attention")
def _(q: Tensor, *rest: object) -> Tensor:
    return _layout(q)


def ordered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    orders: Tensor,
    masks: Tensor,
    group: int | Tensor,
    spec: str,
    operands: Operands,
) -> Tensor:
    """Return an attention with ordered tokens as one node of a graph.

    Args:
        q: `(B, H, N, D)`.
        k: `(B, H, N, D)`.
        v: `(B, H, N, D)`.
        scale: Positive.
        orders: See `live_blocks`, as `masks`.
        masks: Of all step groups.
        group: See `attend_by_group`.
        spec: Of the tokens, as JSON: a graph knows no objects.
        operands: Formats that they are rounded to.
    """
    if isinstance(group, int):
        group = torch.full((1,), group, device=q.device)
    formats = [name or "" for name in operands]
    found: Tensor = torch.ops.dq.ordered_attention(
        q, k, v, scale, orders, masks, group, spec, formats
    )
    return found
