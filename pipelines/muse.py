"""Masked image transformers, which predict tokens of a codebook instead of noise: aMUSEd."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dq.family import Family, Role, assign_roles, ends, families

__all__ = ["MUSE"]

_ROLES = (
    ("embed.conv", Role.IO),
    ("mlm_layer.*", Role.IO),
    ("cond_embed.*", Role.TIME),  # of image size and pooled text: there is no timestep
    ("encoder_proj", Role.CAPTION),
    ("*.kv_mapper", Role.CAPTION),
    ("project_to_hidden", Role.PROJECTION),
    ("project_from_hidden", Role.PROJECTION),
    ("*.cond_embeds_mapper", Role.MODULATION),
    ("*.norm?.linear", Role.MODULATION),
    ("transformer_layers.*.attn1.*", Role.SELF_ATTENTION),
    ("*.attn?.to_[kv]", Role.CROSS_KV),  # beside the convolutions both attentions look at the text
    ("*.attn?.*", Role.CROSS_ATTENTION),
    ("*.ff.*", Role.FEED_FORWARD),
    ("*.channelwise_linear_?", Role.FEED_FORWARD),
    ("*.depthwise", Role.CONVOLUTION),
    ("*.downsample.*", Role.CONVOLUTION),
)
_PIXELS = 16  # of a token, each way: sizes are told in pixels


def _roles(model: nn.Module) -> dict[str, Role]:
    return assign_roles(model, _ROLES)


def _blocks(model: Any) -> tuple[str, ...]:
    """Return convolutions with cross-attention, transformer blocks, and convolutions again."""
    middle = (f"transformer_layers.{i}" for i in range(len(model.transformer_layers)))
    return ("down_block", *middle, "up_block")


def _splits(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {}


def _sample_inputs(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    """Return images of which about half of the tokens are still masked."""
    config, like = model.config, model  # codes do not tell the dtype
    size = config.sample_size

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(like.device, like.dtype)

    tokens = torch.randint(config.codebook_size, (batch, size, size), generator=generator)
    masked = torch.rand(tokens.shape, generator=generator) < 0.5
    mask = config.vocab_size - 1  # the last entry of the table, as published
    side = float(_PIXELS * size)
    told = torch.tensor([[side, side, 0.0, 0.0, 6.0]])  # width, height, corner, aesthetic score
    return {
        "input_ids": tokens.masked_fill(masked, mask).to(like.device),
        "encoder_hidden_states": normal(batch, 77, config.encoder_hidden_size),
        "pooled_text_emb": normal(batch, config.cond_embed_dim),
        "micro_conds": told.repeat(batch, 1).to(like.device, like.dtype),
    }


MUSE: Family = families.add(
    "muse",
    Family(
        name="muse",
        denoiser="transformer",
        classes=("UVit2DModel",),
        roles=_roles,
        blocks=_blocks,
        splits=_splits,
        sample_inputs=_sample_inputs,
        # No prompt: text is projected and normalized before it is attended to. No token stands out
        # after that, and the first one is not what it was in full precision: it is not recognized.
        outer=lambda model: ends(_blocks(model)),
        dynamic_inputs=True,
        logits_axis=1,
    ),
)
