"""UNets of Stable Diffusion 1.x, 2.x and XL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from dq.family import Family, Role, assign_roles, families
from dq.tokens.layout import TokenLayout

__all__ = ["UNET"]

_ROLES = (
    ("conv_in", Role.IO),
    ("conv_out", Role.IO),
    ("time_embedding.*", Role.TIME),
    ("add_embedding.*", Role.TIME),
    ("class_embedding*", Role.TIME),
    ("*.time_emb_proj", Role.TIME),
    ("encoder_hid_proj*", Role.CAPTION),
    ("up_blocks.*.resnets.*.conv_shortcut", Role.SKIP),
    ("*.attn1.*", Role.SELF_ATTENTION),
    ("*.attn2.to_[kv]", Role.CROSS_KV),
    ("*.attn2.*", Role.CROSS_ATTENTION),
    ("*.ff.*", Role.FEED_FORWARD),
    ("*.attentions.*.proj_in", Role.PROJECTION),
    ("*.attentions.*.proj_out", Role.PROJECTION),
    ("*.attentions.*.to_*", Role.SELF_ATTENTION),
    ("*.resnets.*", Role.CONVOLUTION),
    ("*.downsamplers.*", Role.CONVOLUTION),
    ("*.upsamplers.*", Role.CONVOLUTION),
)


def _roles(model: nn.Module) -> dict[str, Role]:
    return assign_roles(model, _ROLES)


def _blocks(model: Any) -> tuple[str, ...]:
    """Return down blocks, mid block and up blocks."""
    names = [f"down_blocks.{i}" for i in range(len(model.down_blocks))]
    names += ["mid_block"] if model.mid_block is not None else []
    names += [f"up_blocks.{i}" for i in range(len(model.up_blocks))]
    return tuple(names)


def _outer(model: Any) -> tuple[str, ...]:
    """Return the two finest levels; what leads from the second to the third is not among them."""
    last = len(model.up_blocks) - 1
    names = ["down_blocks.0", "down_blocks.1.resnets", "down_blocks.1.attentions"]
    names += [f"up_blocks.{i}" for i in range(max(0, last - 1), last + 1)]
    return tuple(names)


def _splits(model: Any) -> dict[str, tuple[int, ...]]:
    """Return (hidden, skip) of each shortcut in the up blocks; only they see the concatenation."""
    if model.mid_block is not None:
        hidden = model.mid_block.resnets[-1].out_channels
    else:
        hidden = model.config.block_out_channels[-1]
    splits: dict[str, tuple[int, ...]] = {}
    for i, block in enumerate(model.up_blocks):
        for j, resnet in enumerate(block.resnets):
            name = f"up_blocks.{i}.resnets.{j}.conv_shortcut"
            if resnet.conv_shortcut is not None:
                splits[name] = (hidden, resnet.in_channels - hidden)
            hidden = resnet.out_channels
    return splits


def _fed(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the norms of the transformer blocks, and those before them."""
    fed: dict[str, tuple[str, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, BasicTransformerBlock):
            fed[f"{name}.norm1"] = _queries(module.attn1, f"{name}.attn1")
            if module.attn2 is not None:
                fed[f"{name}.norm2"] = _queries(module.attn2, f"{name}.attn2")
            fed[f"{name}.norm3"] = (f"{name}.ff.net.0.proj",)
        elif isinstance(module, Transformer2DModel):
            fed[f"{name}.norm"] = (f"{name}.proj_in",)
    modules = dict(model.named_modules())
    affine = (nn.LayerNorm, nn.GroupNorm)
    return {
        name: layers
        for name, layers in fed.items()
        if isinstance(norm := modules.get(name), affine)
        and norm.weight is not None
        and norm.bias is not None
    }


def _queries(attention: Any, name: str) -> tuple[str, ...]:
    """Return the layers of an attention that see its own input, not the prompt."""
    seen = ("to_q",) if attention.is_cross_attention else ("to_q", "to_k", "to_v")
    return tuple(f"{name}.{leaf}" for leaf in seen)


def _prompt(model: Any) -> str:
    """Return the text argument; where image tokens are put before the text, it says nothing."""
    mixed = model.config.encoder_hid_dim_type in ("image_proj", "text_image_proj")
    return "" if mixed else "encoder_hidden_states"


def _timed(model: Any) -> tuple[str, ...]:
    """Return the time embedding; its projections too, where nothing else is added to it.

    SDXL adds sizes and pooled text, others classes, and distilled models the guidance scale.
    """
    config = model.config
    if config.time_cond_proj_dim is not None:
        return ()
    alone = not (config.class_embed_type or config.num_class_embeds or config.addition_embed_type)
    kinds = ("time_embedding.", *((".time_emb_proj",) if alone else ()))
    return tuple(n for n in _roles(model) if n.startswith(kinds[0]) or n.endswith(kinds[1:]))


def _layouts(model: Any, call: Mapping[str, Any]) -> tuple[TokenLayout, ...]:
    """Return the pixels of each level: convolutions of stride 2 round up."""
    height, width = call["sample"].shape[-2:]
    grids = [(height, width)]
    for _ in model.down_blocks[1:]:
        height, width = -(-height // 2), -(-width // 2)
        grids.append((height, width))
    return tuple(TokenLayout(grid) for grid in grids)


def _sample_inputs(model: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    config, like = model.config, model  # codes do not tell the dtype, nor do weights cast by layer
    size = config.sample_size if isinstance(config.sample_size, int) else 64

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(like.device, like.dtype)

    cross = config.cross_attention_dim
    width = cross if isinstance(cross, int) else cross[0]
    inputs: dict[str, Any] = {
        "sample": normal(batch, config.in_channels, size, size),
        "timestep": torch.tensor(500, device=like.device),
        "encoder_hidden_states": normal(batch, 77, width),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        sizes = torch.tensor([[size * 8.0, size * 8.0, 0.0, 0.0, size * 8.0, size * 8.0]])
        inputs["added_cond_kwargs"] = {
            "text_embeds": normal(batch, pooled),
            "time_ids": sizes.repeat(batch, 1).to(like.device),
        }
    return inputs


UNET: Family = families.add(
    "unet",
    Family(
        name="unet",
        denoiser="unet",
        classes=("UNet2DConditionModel",),
        roles=_roles,
        blocks=_blocks,
        splits=_splits,
        sample_inputs=_sample_inputs,
        prompt=_prompt,
        fed=_fed,
        timed=_timed,
        output=lambda model: "conv_out",
        outer=_outer,
        layouts=_layouts,
    ),
)
