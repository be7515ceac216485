"""Attention with ordered tokens: at once, and as an opaque operator of compiled graphs."""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from torch import Tensor

from dq.attention_spec import AttentionSpec
from dq.kernels.block_sparse import (
    FLOAT,
    Operands,
    attend_by_group,
    block_sparse_attention,
    live_blocks,
)
from dq.kernels.live_blocks import LiveBlocks
from dq.nn.operands import quantized_attention
from dq.nn.token_site import TokenSite

__all__ = ["formats_by_block", "ordered_attention", "text_of"]


def formats_by_block(spec: AttentionSpec) -> Operands:
    """Return the formats of operands whose scales are those of blocks."""
    if not spec.by_block:
        return FLOAT
    parts = spec.query_key, spec.value, spec.probabilities
    return Operands(*(None if part is None else part.format for part in parts))


def text_of(spec: AttentionSpec) -> str:
    """Return a spec as JSON: graphs know no objects."""
    return json.dumps(spec.to_dict())


def ordered_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, site: TokenSite, spec: AttentionSpec, text: str
) -> Tensor:
    """Return an attention with ordered tokens, each image with the masks of its step group.

    Args:
        q: `(B, H, N, D)`.
        k: `(B, H, N, D)`.
        v: `(B, H, N, D)`.
        scale: Positive.
        site: What the attention stores, and the step group of the call.
        spec: What is computed.
        text: The same, of `text_of`.
    """
    group = site.group()
    if not torch.compiler.is_compiling():
        return attend_by_group(
            q, k, v, group, lambda q, k, v, g: _attend(q, k, v, scale, site.live(g), spec)
        )
    if isinstance(group, int):
        group = torch.full((1,), group, device=q.device)
    found: Tensor = torch.ops.dq.ordered_attention(
        q, k, v, scale, site.token_order, site.block_mask, group, text
    )
    return found


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, blocks: LiveBlocks, spec: AttentionSpec
) -> Tensor:
    if not spec.by_token:
        return block_sparse_attention(q, k, v, scale, blocks, formats_by_block(spec))
    moved = blocks.moved(q), blocks.moved(k), blocks.moved(v)
    return blocks.restored(quantized_attention(*moved, scale, spec, blocks.mask))


def _layout(q: Tensor) -> Tensor:
    """Return an empty output: the heads of a token side by side, as layers after it want them."""
    batch, heads, tokens, depth = q.shape
    return q.new_empty(batch, tokens, heads, depth).transpose(1, 2)


@functools.lru_cache(maxsize=64)
def _read(text: str) -> AttentionSpec:
    return AttentionSpec.from_dict(json.loads(text))


_OPERANDS = "Tensor q, Tensor k, Tensor v, float scale, Tensor orders, Tensor masks, Tensor group"
torch.library.define("dq::ordered_attention", f"({_OPERANDS}, str spec) -> Tensor")
torch.library.define(
    "dq::ordered_attention_backward",
    f"(Tensor gradient, {_OPERANDS}, str spec) -> (Tensor, Tensor, Tensor)",
)


def _computed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    orders: Tensor,
    masks: Tensor,
    group: Tensor,
    text: str,
) -> Tensor:
    spec = _read(text)
    tokens = spec.tokens
    assert tokens is not None  # nothing else comes here

    def attend(q: Tensor, k: Tensor, v: Tensor, group: int) -> Tensor:
        return _attend(q, k, v, scale, live_blocks(tokens, orders, masks, group), spec)

    return attend_by_group(q, k, v, group, attend)


def _forward(q: Tensor, *rest: Any) -> Tensor:
    return _layout(q).copy_(_computed(q, *rest))


def _again(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Compute it again by a way that has gradients, as without a graph."""
    with torch.enable_grad():
        q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
        found = torch.autograd.grad(_computed(q, k, v, *rest), (q, k, v), gradient)
    return tuple(t.contiguous() for t in found)


def _like(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, scale, orders, masks, group, text = inputs
    ctx.save_for_backward(q, k, v, orders, masks, group)
    ctx.scale, ctx.text = scale, text


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    q, k, v, orders, masks, group = ctx.saved_tensors
    found = torch.ops.dq.ordered_attention_backward(
        gradient, q, k, v, ctx.scale, orders, masks, group, ctx.text
    )
    return *found, None, None, None, None, None


for _device in ("cpu", "cuda"):
    torch.library.impl("dq::ordered_attention", _device, _forward)
    torch.library.impl("dq::ordered_attention_backward", _device, _again)
torch.library.register_fake("dq::ordered_attention", lambda q, *rest: _layout(q))
torch.library.register_fake("dq::ordered_attention_backward", _like)
torch.library.register_autograd("dq::ordered_attention", _backward, setup_context=_keep)
