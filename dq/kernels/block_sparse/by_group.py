"""Masks that change with the timestep: those of a step group, and calls that need several."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from dq.kernels.live_blocks import LiveBlocks
from dq.tokens.spec import TokenSpec

__all__ = ["attend_by_group", "live_blocks"]


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
