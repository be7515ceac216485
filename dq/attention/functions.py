"""What stands in the place of torch's and diffusers' attention functions.

A faster attention, or one with quantized operands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.models import attention_dispatch
from torch import Tensor
from torch.nn import functional as F

from dq.attention_spec import AttentionSpec
from dq.errors import DQError
from dq.kernels.attention import attention, serves
from dq.nn.operands import quantized_attention

__all__ = ["dispatch_attention_fn", "quantized", "scaled_dot_product_attention"]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute what torch's function of this name does, faster where dq has a way.

    Args:
        query: `(B, H, N, D)`.
        key: `(B, H, M, D)`.
        value: `(B, H, M, D)`.
        attn_mask: As in torch, like all that follow.
        dropout_p: Probability of dropping.
        is_causal: Whether queries see earlier keys only.
        scale: Of the scores; one over the root of D if None.
        enable_gqa: Whether heads share keys.
    """
    factor = float(query.shape[-1] ** -0.5 if scale is None else scale)
    plain = attn_mask is None and not dropout_p and not is_causal and not enable_gqa
    if plain and serves(query, key, value, factor):
        return attention(query, key, value, factor)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def dispatch_attention_fn(
    query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any
) -> Tensor:
    """Compute what diffusers' function of this name does, faster where dq has a way.

    Args:
        query: `(B, N, H, D)`.
        key: `(B, M, H, D)`.
        value: `(B, M, H, D)`.
        *arguments: As in diffusers.
        **options: As in diffusers.
    """
    given = [v for v in (*arguments, *options.values()) if v is not None and v is not False]
    if not any(given):  # 0.0 is no dropout; whatever else is asked for, a scale too, is theirs
        active, _ = attention_dispatch._AttentionBackendRegistry.get_active_backend()
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        factor = float(query.shape[-1] ** -0.5)
        if active == attention_dispatch.AttentionBackendName.NATIVE and serves(q, k, v, factor):
            return attention(q, k, v, factor).transpose(1, 2)
    return attention_dispatch.dispatch_attention_fn(query, key, value, *arguments, **options)


def quantized(spec: AttentionSpec) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Return both functions with quantized operands: torch's `(B, H, N, D)`, diffusers' transposed.

    Both take what the originals take, and refuse what they do not know.
    """

    def torch_like(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        **others: Any,
    ) -> Tensor:
        given = [name for name, asked in others.items() if asked is not None]
        if dropout_p or is_causal or enable_gqa or given:
            raise DQError(
                "attention with quantized operands takes no dropout, causal mask, shared heads or "
                f"backend of diffusers {given or ''}; leave the operands of this model in float"
            )
        factor = float(query.shape[-1] ** -0.5 if scale is None else scale)
        return quantized_attention(query, key, value, factor, spec, attn_mask)

    def diffusers_like(
        query: Tensor, key: Tensor, value: Tensor, *rest: Any, **rest_named: Any
    ) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        return torch_like(q, k, v, *rest, **rest_named).transpose(1, 2)

    return torch_like, diffusers_like
