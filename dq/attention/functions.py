"""What stands in the place of torch's and diffusers' attention functions.

A faster attention, or one that a plan changes: operands of few bits, tokens in another order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from diffusers.models import attention_dispatch
from torch import Tensor
from torch.nn import functional as F

from dq.attention.ordered import ordered_attention, text_of
from dq.attention_spec import AttentionSpec
from dq.errors import DQError
from dq.kernels.attention import attention, serves
from dq.nn.operands import quantized_attention
from dq.nn.token_site import TokenSite

__all__ = [
    "Pair",
    "changed",
    "current",
    "dispatch_attention_fn",
    "scaled_dot_product_attention",
    "watched",
]


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
    given = [v for v in (*arguments, *options.values()) if isinstance(v, Tensor) or v]
    if not given:  # whatever is asked for, a scale too, is theirs
        active, _ = attention_dispatch._AttentionBackendRegistry.get_active_backend()
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        factor = float(query.shape[-1] ** -0.5)
        if active == attention_dispatch.AttentionBackendName.NATIVE and serves(q, k, v, factor):
            return attention(q, k, v, factor).transpose(1, 2)
    return attention_dispatch.dispatch_attention_fn(query, key, value, *arguments, **options)


Pair = tuple[Callable[..., Tensor], Callable[..., Tensor]]
Plain = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]


def _pair(attend: Plain, what: str) -> Pair:
    """Return torch's function and diffusers', which has tokens before heads, for one attention.

    Both take what the originals take, and refuse what they do not know.

    Args:
        attend: Computes it of q, k, v `(B, H, N, D)`, the scale and the mask.
        what: It is, for messages.
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
                f"attention with {what} takes no dropout, causal mask, shared heads or backend of "
                f"diffusers {given or ''}; leave that of this model as it is"
            )
        factor = float(query.shape[-1] ** -0.5 if scale is None else scale)
        return attend(query, key, value, factor, attn_mask)

    def diffusers_like(
        query: Tensor, key: Tensor, value: Tensor, *rest: Any, **rest_named: Any
    ) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        return torch_like(q, k, v, *rest, **rest_named).transpose(1, 2)

    return torch_like, diffusers_like


class _Current(threading.local):
    """Whose attention this thread is computing: code of diffusers passes on q, k and v alone."""

    def __init__(self) -> None:
        self.site: TokenSite | None = None  # of the instance: compiled code asks whether it has one


current = _Current()


def changed(spec: AttentionSpec) -> Pair:
    """Return both functions of an attention that a plan changes.

    Where the spec has ordered tokens, `current` says which attention it is.
    """
    if spec.tokens is None:
        return _pair(
            lambda q, k, v, scale, mask: quantized_attention(q, k, v, scale, spec, mask),
            "quantized operands",
        )
    return _pair(partial(_ordered, spec, text_of(spec)), "ordered tokens")


def _ordered(
    spec: AttentionSpec,
    text: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
) -> Tensor:
    """Compute an attention with ordered tokens, the rows of each step group with their masks."""
    if mask is not None:
        raise DQError("attention with ordered tokens takes no mask: its blocks are chosen by one")
    site = current.site
    assert site is not None  # a processor has said
    site.check(q, k)
    return ordered_attention(q, k, v, scale, site, spec, text)


def watched(seen: Callable[[Tensor, Tensor, Tensor, float], None]) -> Pair:
    """Return both original functions, which tell somebody of their operands before they begin.

    Args:
        seen: Is given q, k and v, `(B, H, N, D)` and `(B, H, M, D)` the others, and the scale.
    """

    def tell(q: Tensor, k: Tensor, v: Tensor, named: dict[str, Any]) -> None:
        scale = named.get("scale")
        factor = float(q.shape[-1] ** -0.5 if scale is None else scale)
        seen(q.detach(), k.detach(), v.detach(), factor)

    def torch_like(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Tensor:
        tell(query, key, value, named)
        return F.scaled_dot_product_attention(query, key, value, *rest, **named)

    def diffusers_like(
        query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any
    ) -> Tensor:
        tell(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), named)
        return attention_dispatch.dispatch_attention_fn(query, key, value, *rest, **named)

    return torch_like, diffusers_like
