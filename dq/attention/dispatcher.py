"""`dq_int8`, a backend of diffusers' attention dispatcher: 8-bit operands without any plan.

`model.set_attention_backend("dq_int8")` uses it in every model whose attention goes through the
dispatcher. Tokens keep their order, and every block is computed: with operands of 8 bits on cards
that the kernels run on, simulated elsewhere.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from diffusers.models import attention_dispatch
from torch import Tensor

from dq.kernels.block_sparse import Operands, block_sparse_attention
from dq.kernels.live_blocks import LiveBlocks
from dq.tokens.layout import TokenLayout

__all__ = ["NAME", "attention_of_8_bits", "register"]

NAME = "dq_int8"
_BLOCK = 64
_FORMATS = Operands("int8")  # values stay in 16 bits: no order makes their rounding harmless

logger = logging.getLogger("dq")


@functools.lru_cache(maxsize=16)
def _whole(tokens: int, heads: int, device: torch.device) -> LiveBlocks:
    """Return all blocks of tokens in their own order."""
    table = TokenLayout((1, tokens)).table("hw", _BLOCK).to(device)
    count = len(table) // _BLOCK
    live = torch.ones(heads, count, count, dtype=torch.bool, device=device)
    return LiveBlocks(table.expand(heads, -1).contiguous(), live, (_BLOCK, _BLOCK))


def attention_of_8_bits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute attention with q and k of 8 bits; what is masked, causal or crossed is left to torch.

    Args:
        query: `(B, N, H, D)`.
        key: `(B, M, H, D)`.
        value: `(B, M, H, D)`.
        attn_mask: As in diffusers, like all that follow.
        dropout_p: Probability of dropping.
        is_causal: Whether queries see earlier keys only.
        scale: Of the scores; one over the root of D if None.
        enable_gqa: Whether heads share keys.
    """
    plain = attn_mask is None and not dropout_p and not is_causal and not enable_gqa
    if not plain or query.shape != key.shape:
        native = attention_dispatch._AttentionBackendRegistry._backends
        found: Tensor = native[attention_dispatch.AttentionBackendName.NATIVE](
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )
        return found
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    blocks = _whole(q.shape[2], q.shape[1], q.device)
    factor = float(q.shape[-1] ** -0.5 if scale is None else scale)
    return block_sparse_attention(q, k, v, factor, blocks, _FORMATS).transpose(1, 2)


def register() -> None:
    """Make the backend known to diffusers.

    Its names are members of an enumeration that is closed; there is no public way to add one, so
    that a diffusers which has changed is left alone, with a word in the log.
    """
    names: Any = attention_dispatch.AttentionBackendName
    if NAME in names._value2member_map_:
        return
    try:
        member = str.__new__(names, NAME)
        member._name_, member._value_ = NAME.upper(), NAME
        attention_dispatch._AttentionBackendRegistry.register(member)(attention_of_8_bits)
        names._member_map_[member._name_] = member
        names._value2member_map_[NAME] = member
        names._member_names_.append(member._name_)
    except (AttributeError, TypeError) as error:
        logger.info("attention backend %s is not there with this diffusers: %s", NAME, error)
