"""Multimodal diffusion transformers, where text and image attend jointly: SD3 and Flux."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dq.family import Family, Role, assign_roles, ends, families
from dq.tokens.layout import TokenLayout

__all__ = ["MMDIT"]

_ROLES = (
    ("pos_embed.*", Role.IO),
    ("x_embedder", Role.IO),
    ("proj_out", Role.IO),
    ("time_text_embed.*", Role.TIME),
    ("context_embedder", Role.CAPTION),
    ("*.norm1.linear", Role.MODULATION),
    ("*.norm1_context.linear", Role.MODULATION),
    ("*.norm.linear", Role.MODULATION),
    ("norm_out.linear", Role.MODULATION),
    ("*.attn.*", Role.SELF_ATTENTION),
    ("*.attn2.*", Role.SELF_ATTENTION),  # SD3.5: a second self-attention of the image tokens
    ("*.ff.*", Role.FEED_FORWARD),
    ("*.ff_context.*", Role.FEED_FORWARD),
    ("*.proj_mlp", Role.FEED_FORWARD),
    ("*.proj_out", Role.FEED_FORWARD),
)


def _roles(model: nn.Module) -> dict[str, Role]:
    return assign_roles(model, _ROLES)


def _blocks(model: Any) -> tuple[str, ...]:
    """Return joint blocks, then Flux's single ones."""
    names = [f"transformer_blocks.{i}" for i in range(len(model.transformer_blocks))]
    single = getattr(model, "single_transformer_blocks", ())
    return (*names, *(f"single_transformer_blocks.{i}" for i in range(len(single))))


def _splits(model: Any) -> dict[str, tuple[int, ...]]:
    """Return (attention, feed-forward) of the outputs of Flux's single blocks, a concatenation."""
    single = getattr(model, "single_transformer_blocks", ())
    splits: dict[str, tuple[int, ...]] = {}
    for i, block in enumerate(single):
        width = block.proj_out.in_features - block.proj_mlp.out_features
        splits[f"single_transformer_blocks.{i}.proj_out"] = (width, block.proj_mlp.out_features)
    return splits


def _timed(model: nn.Module) -> tuple[str, ...]:
    """Return the embedding of the timestep; guidance and pooled text are added after it."""
    return tuple(n for n in _roles(model) if n.startswith("time_text_embed.timestep_embedder."))


def _layouts(model: Any, call: Mapping[str, Any]) -> tuple[TokenLayout, ...]:
    """Return image and text together, and with SD3 the image alone: it has such attentions too.

    Flux says where each image token lies; where these are of several images, there is no grid.
    """
    text = call["encoder_hidden_states"].shape[1]
    if type(model).__name__ == "SD3Transformer2DModel":
        patch = model.config.patch_size
        height, width = (size // patch for size in call["hidden_states"].shape[-2:])
        return TokenLayout((height, width), text), TokenLayout((height, width))
    ids = call["img_ids"].reshape(-1, 3).long()
    height, width = (int(ids[:, axis].max()) + 1 for axis in (1, 2))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    whole = torch.stack([torch.zeros_like(rows), rows, columns], -1).view(-1, 3)
    if ids.shape != whole.shape or not torch.equal(ids.cpu(), whole):
        return ()
    return (TokenLayout((height, width), text, text_first=True),)


def _sample_inputs(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    config, like = model.config, model.proj_out.bias

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(like.device, like.dtype)

    inputs: dict[str, Any] = {
        "encoder_hidden_states": normal(batch, 32, config.joint_attention_dim),
        "pooled_projections": normal(batch, config.pooled_projection_dim),
    }
    if type(model).__name__ == "SD3Transformer2DModel":
        size = config.sample_size
        inputs["hidden_states"] = normal(batch, config.in_channels, size, size)
        inputs["timestep"] = torch.full((batch,), 500.0, device=like.device)
        return inputs
    side = 8
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    grid = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).view(-1, 3)
    inputs["hidden_states"] = normal(batch, side * side, config.in_channels)
    inputs["timestep"] = torch.full((batch,), 0.5, device=like.device, dtype=like.dtype)
    inputs["img_ids"] = grid.to(like.device, like.dtype)
    inputs["txt_ids"] = torch.zeros(32, 3, device=like.device, dtype=like.dtype)
    if config.guidance_embeds:
        inputs["guidance"] = torch.full((batch,), 3.5, device=like.device, dtype=like.dtype)
    return inputs


MMDIT: Family = families.add(
    "mmdit",
    Family(
        name="mmdit",
        denoiser="transformer",
        classes=("SD3Transformer2DModel", "FluxTransformer2DModel"),
        roles=_roles,
        blocks=_blocks,
        splits=_splits,
        sample_inputs=_sample_inputs,
        timed=_timed,
        output=lambda model: "proj_out",
        outer=lambda model: ends(_blocks(model)),
        layouts=_layouts,
        dynamic_inputs=True,
    ),
)
