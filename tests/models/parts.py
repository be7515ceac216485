"""The components tiny pipelines share: seeding, VAE, tokenizers and text encoders."""

from __future__ import annotations

import string
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

__all__ = [
    "aligned",
    "clip_text",
    "clip_text_projected",
    "clip_tokenizer",
    "finish",
    "kl_vae",
    "seeded",
    "t5_text",
    "t5_tokenizer",
]

PipelineT = TypeVar("PipelineT", bound=DiffusionPipeline)

_CHARACTERS = string.ascii_lowercase + string.digits + ".,!?-'"
_MERGES = ["l o", "lo w", "e r</w>", "f o", "fo x</w>", "t h", "th e</w>", "r e"]
_CLIP_MAX_LENGTH = 77
_T5_MAX_LENGTH = 512


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Makes the weights drawn inside reproducible and leaves the caller's random state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def finish(pipe: PipelineT) -> PipelineT:
    """Puts every component in eval mode and silences the step bar.

    Models built from a config start in train mode, where T5's dropout moves the output by 3e-3.
    """
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def aligned(pipe: PipelineT) -> PipelineT:
    """Moves every weight of a loaded pipeline to memory of its own, in place; values are unchanged.

    safetensors maps tensors at whatever offset the file's header leaves. Given such a weight, the
    one-row products of MKL add up in another order and differ in the last bit from those of the
    model that was saved. Call this before comparing a reloaded model bit for bit.
    """
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            for tensor in (*component.parameters(), *component.buffers()):
                tensor.data = tensor.data.clone()
    return pipe


def kl_vae(latent_channels: int = 4, **overrides: Any) -> AutoencoderKL:
    """Returns a VAE: images (N, 3, H, W) to latents (N, latent_channels, H / 2, W / 2)."""
    config: dict[str, Any] = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": latent_channels,
        "norm_num_groups": 4,
        "sample_size": 32,
    }
    return AutoencoderKL(**(config | overrides))


def _clip_vocabulary() -> dict[str, int]:
    pieces = [*_CHARACTERS, *(c + "</w>" for c in _CHARACTERS)]
    pieces += [merge.replace(" ", "") for merge in _MERGES]
    # Last, as in the published vocabulary: CLIP pools at the end token, whose id must not be 2,
    # the value that selects the legacy rule.
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return {piece: index for index, piece in enumerate(pieces)}


def clip_tokenizer() -> CLIPTokenizer:
    """Returns a CLIP tokenizer over characters and eight merges, `model_max_length` 77."""
    merges = [tuple(merge.split(" ")) for merge in _MERGES]
    return CLIPTokenizer(vocab=_clip_vocabulary(), merges=merges, model_max_length=_CLIP_MAX_LENGTH)


def _clip_config(width: int) -> CLIPTextConfig:
    vocabulary = _clip_vocabulary()
    end = vocabulary["<|endoftext|>"]
    return CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=_CLIP_MAX_LENGTH,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=end,
        pad_token_id=end,
    )


def clip_text(width: int) -> CLIPTextModel:
    """Returns a CLIP text encoder: states (N, 77, width), pooled (N, width)."""
    return CLIPTextModel(_clip_config(width))


def clip_text_projected(width: int) -> CLIPTextModelWithProjection:
    """Returns a CLIP text encoder with projection: states (N, 77, width), embeds (N, width)."""
    return CLIPTextModelWithProjection(_clip_config(width))


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of one token per character and T5's end token; no sentencepiece."""
    pieces = ["<pad>", "</s>", "<unk>", " ", *_CHARACTERS]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=_T5_MAX_LENGTH,
    )


def t5_text(width: int) -> T5EncoderModel:
    """Returns a T5 encoder: tokens (N, L) to states (N, L, width)."""
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config)
