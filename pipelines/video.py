"""Video transformers: CogVideoX (text and video attend jointly) and Wan (cross-attention)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dq.family import Family, Role, assign_roles, ends, families
from dq.tokens.layout import TokenLayout

__all__ = ["VIDEO"]

_COGVIDEOX = "CogVideoXTransformer3DModel"

_ROLES = (
    ("patch_embed.text_proj", Role.CAPTION),
    ("patch_embed.*", Role.IO),
    ("proj_out", Role.IO),
    ("time_embedding.*", Role.TIME),
    ("ofs_embedding.*", Role.TIME),
    ("condition_embedder.time_embedder.*", Role.TIME),
    ("condition_embedder.time_proj", Role.MODULATION),
    ("condition_embedder.*", Role.CAPTION),
    ("*.norm1.linear", Role.MODULATION),
    ("*.norm2.linear", Role.MODULATION),
    ("norm_out.linear", Role.MODULATION),
    ("*.attn1.*", Role.SELF_ATTENTION),
    ("*.attn2.to_[kv]", Role.CROSS_KV),
    ("*.attn2.add_[kv]_proj", Role.CROSS_KV),
    ("*.attn2.*", Role.CROSS_ATTENTION),
    ("*.ff.*", Role.FEED_FORWARD),
    ("*.ffn.*", Role.FEED_FORWARD),
)


def _roles(model: nn.Module) -> dict[str, Role]:
    return assign_roles(model, _ROLES)


def _blocks(model: Any) -> tuple[str, ...]:
    name = "transformer_blocks" if type(model).__name__ == _COGVIDEOX else "blocks"
    return tuple(f"{name}.{i}" for i in range(len(getattr(model, name))))


def _timed(model: nn.Module) -> tuple[str, ...]:
    """Return the embedding of the timestep, with Wan what modulates the blocks too."""
    kinds = ("time_embedding.", "condition_embedder.time_")
    return tuple(name for name in _roles(model) if name.startswith(kinds))


def _layouts(model: Any, call: Mapping[str, Any]) -> tuple[TokenLayout, ...]:
    shape, config = call["hidden_states"].shape, model.config
    if type(model).__name__ == _COGVIDEOX:
        patch = config.patch_size_t or 1, config.patch_size, config.patch_size
        grid = (shape[1], *shape[3:])
    else:
        patch, grid = tuple(config.patch_size), shape[2:]
    frames, height, width = (size // p for size, p in zip(grid, patch, strict=True))
    text = call["encoder_hidden_states"].shape[1] if type(model).__name__ == _COGVIDEOX else 0
    return (TokenLayout((frames, height, width), text, text_first=True),)


def _sample_inputs(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    config, like = model.config, model.proj_out.bias

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(like.device, like.dtype)

    if type(model).__name__ == _COGVIDEOX:
        patch = config.patch_size_t or 1
        frames = -(-((config.sample_frames - 1) // config.temporal_compression_ratio + 1) // patch)
        height, width = config.sample_height, config.sample_width
        rotary = None
        if config.use_rotary_positional_embeddings:
            tokens = frames * (height // config.patch_size) * (width // config.patch_size)
            angles = torch.rand(tokens, config.attention_head_dim, generator=generator) * 6
            rotary = angles.cos().to(like.device), angles.sin().to(like.device)
        return {
            "hidden_states": normal(batch, frames * patch, config.in_channels, height, width),
            "encoder_hidden_states": normal(
                batch, config.max_text_seq_length, config.text_embed_dim
            ),
            "timestep": torch.full((batch,), 500, device=like.device),
            "image_rotary_emb": rotary,
        }
    _, rows, columns = config.patch_size
    return {
        "hidden_states": normal(batch, config.in_channels, 3, 4 * rows, 4 * columns),
        "timestep": torch.full((batch,), 500, device=like.device),
        "encoder_hidden_states": normal(batch, 32, config.text_dim),
    }


VIDEO: Family = families.add(
    "video",
    Family(
        name="video",
        denoiser="transformer",
        classes=(_COGVIDEOX, "WanTransformer3DModel"),
        roles=_roles,
        blocks=_blocks,
        splits=lambda model: {},
        sample_inputs=_sample_inputs,
        timed=_timed,
        output=lambda model: "proj_out",
        outer=lambda model: ends(_blocks(model)),
        layouts=_layouts,
        dynamic_inputs=True,
    ),
)
