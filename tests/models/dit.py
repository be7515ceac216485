"""Tiny single-stream diffusion transformers: class-conditional DiT and text-conditional PixArt."""

from __future__ import annotations

from diffusers import (
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)

from tests.models.parts import finish, kl_vae, seeded, t5_text, t5_tokenizer

__all__ = ["dit64", "pixart64"]

CAPTION_WIDTH = 32


def dit64() -> DiTPipeline:
    """Returns DiT with 2 blocks of 4 heads x 16 over 8 x 8 tokens.

    It has 1000 classes whatever its size: the pipeline's null label is the constant 1000.
    """
    with seeded():
        return finish(
            DiTPipeline(
                transformer=DiTTransformer2DModel(
                    sample_size=16,
                    patch_size=2,
                    num_layers=2,
                    num_attention_heads=4,
                    attention_head_dim=16,
                    in_channels=4,
                    out_channels=8,  # noise and variance, as published
                    attention_bias=True,
                    activation_fn="gelu-approximate",
                    num_embeds_ada_norm=1000,
                    norm_type="ada_norm_zero",
                    norm_elementwise_affine=False,
                ),
                vae=kl_vae(),
                scheduler=DDIMScheduler(clip_sample=False),
            )
        )


def pixart64() -> PixArtAlphaPipeline:
    """Returns PixArt-alpha with 2 blocks of 4 heads x 16 over 8 x 8 tokens, text width 32."""
    with seeded():
        return finish(
            PixArtAlphaPipeline(
                transformer=PixArtTransformer2DModel(
                    sample_size=16,
                    patch_size=2,
                    num_layers=2,
                    num_attention_heads=4,
                    attention_head_dim=16,
                    in_channels=4,
                    out_channels=8,
                    cross_attention_dim=64,
                    caption_channels=CAPTION_WIDTH,
                    attention_bias=True,
                    activation_fn="gelu-approximate",
                    num_embeds_ada_norm=1000,
                    norm_type="ada_norm_single",
                    norm_elementwise_affine=False,
                    norm_eps=1e-6,
                ),
                vae=kl_vae(),
                text_encoder=t5_text(CAPTION_WIDTH),
                tokenizer=t5_tokenizer(),
                scheduler=DDIMScheduler(clip_sample=False),
            )
        )
