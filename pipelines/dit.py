"""Diffusion transformers with adaptive norms: DiT (classes) and PixArt (text, cross-attention)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dq.family import Family, Role, assign_roles, ends, families
from dq.tokens.layout import TokenLayout

__all__ = ["DIT"]

_ROLES = (
    ("pos_embed.*", Role.IO),
    ("proj_out_1", Role.MODULATION),  # DiT: shift and scale of the last norm, despite its name
    ("proj_out*", Role.IO),
    ("*.norm1.emb.*", Role.TIME),
    ("*.norm1.linear", Role.MODULATION),
    ("adaln_single.emb.*", Role.TIME),
    ("adaln_single.linear", Role.MODULATION),
    ("caption_projection.*", Role.CAPTION),
    ("*.attn1.*", Role.SELF_ATTENTION),
    ("*.attn2.to_[kv]", Role.CROSS_KV),
    ("*.attn2.*", Role.CROSS_ATTENTION),
    ("*.ff.*", Role.FEED_FORWARD),
)


def _roles(model: nn.Module) -> dict[str, Role]:
    return assign_roles(model, _ROLES)


def _blocks(model: Any) -> tuple[str, ...]:
    return tuple(f"transformer_blocks.{i}" for i in range(len(model.transformer_blocks)))


def _splits(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {}


def _timed(model: Any) -> tuple[str, ...]:
    """Return the embeddings of the timestep.

    With PixArt, what shifts and scales every block follows from them alone, unless sizes are added.
    """
    names = [name for name in _roles(model) if ".timestep_embedder." in name]
    if type(model).__name__ == "PixArtTransformer2DModel" and not model.use_additional_conditions:
        names.append("adaln_single.linear")
    return tuple(names)


def _output(model: nn.Module) -> str:
    return "proj_out_2" if hasattr(model, "proj_out_2") else "proj_out"


def _layouts(model: Any, call: Mapping[str, Any]) -> tuple[TokenLayout, ...]:
    height, width = (size // model.config.patch_size for size in call["hidden_states"].shape[-2:])
    return (TokenLayout((height, width)),)


def _sample_inputs(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    config, like = model.config, model.pos_embed.proj.bias
    size = config.sample_size

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(like.device, like.dtype)

    inputs: dict[str, Any] = {
        "hidden_states": normal(batch, config.in_channels, size, size),
        "timestep": torch.full((batch,), 500, device=like.device),
    }
    if type(model).__name__ == "PixArtTransformer2DModel":
        inputs["encoder_hidden_states"] = normal(batch, 32, config.caption_channels)
        inputs["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    else:
        classes = torch.randint(config.num_embeds_ada_norm, (batch,), generator=generator)
        inputs["class_labels"] = classes.to(like.device)
    return inputs


DIT: Family = families.add(
    "dit",
    Family(
        name="dit",
        denoiser="transformer",
        classes=("DiTTransformer2DModel", "PixArtTransformer2DModel"),
        roles=_roles,
        blocks=_blocks,
        splits=_splits,
        sample_inputs=_sample_inputs,
        timed=_timed,
        output=_output,
        outer=lambda model: ends(_blocks(model)),
        layouts=_layouts,
        dynamic_inputs=True,
    ),
)
