"""Attention on CPUs: several ways to compute the same, the fastest taken by size.

torch's own `scaled_dot_product_attention` is one of them. In bfloat16 two batched products with a
softmax between are faster at some sizes, and the native kernel, where the machine can build and run
it, at all that were measured. All round probabilities to bfloat16 and sum in float32; the products
round scores as well, which costs digits where these are large.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from dq.kernels.measured import fastest
from dq.kernels.native import calls

__all__ = ["WAYS", "attention", "available", "serves"]

Way = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def _tiles(queries: int) -> Way:
    """Return two batched products, over so many queries at a time."""

    def way(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        batch, heads, tokens, depth = q.shape
        out = torch.empty(batch, tokens, heads, depth, dtype=q.dtype).transpose(1, 2)
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        nothing = q.new_empty(())
        for start in range(0, tokens, queries):
            part = slice(start, start + queries)
            scores = torch.baddbmm(nothing, q[:, part], k.mT, beta=0, alpha=scale)
            out[:, :, part] = torch.bmm(scores.softmax(-1), v).unflatten(0, (batch, heads))
        return out

    return way


WAYS: dict[str, Way] = {
    "native": calls.attention,
    "tiles of 64": _tiles(64),
    "tiles of 256": _tiles(256),
    "sdpa": _sdpa,
}


def available() -> list[str]:
    """Return the names of the ways that this machine has."""
    return [name for name in WAYS if name != "native" or calls.has_attention()]


def serves(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Whether `attention` takes these: bfloat16 on a CPU, features side by side, no gradients."""
    tensors = (q, k, v)
    return (
        all(t.device.type == "cpu" and t.dtype == torch.bfloat16 for t in tensors)
        and all(t.dim() == 4 and t.stride(3) == 1 for t in tensors)
        and q.shape[:2] == k.shape[:2]
        and v.shape == k.shape
        and scale > 0
        and 0 not in (*q.shape, *k.shape)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    shape = q.shape[2], k.shape[2], q.shape[3]
    return WAYS[fastest("attention", shape, tuple(available()))](q, k, v, scale)


torch.library.define("dq::attention", "(Tensor q, Tensor k, Tensor v, float scale) -> Tensor")
torch.library.impl("dq::attention", "CPU", _attention)


@torch.library.register_fake("dq::attention")
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    batch, heads, tokens, _ = q.shape
    return q.new_empty(batch, tokens, heads, v.shape[3]).transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return `softmax(scale * q k^T) v` by the way that is fastest at this size.

    Args:
        q: `(B, H, N, D)`; see `serves`.
        k: `(B, H, M, D)`.
        v: `(B, H, M, D)`.
        scale: Positive.

    Returns:
        `(B, H, N, D)`; the heads of a token lie side by side, as layers after attention want it.
    """
    if torch.compiler.is_compiling():
        return torch.ops.dq.attention(q, k, v, scale)
    return _attention(q, k, v, scale)
