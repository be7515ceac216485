"""Tiny two-stream diffusion transformers with joint attention: Stable Diffusion 3 and Flux."""

from __future__ import annotations

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from tests.models.parts import (
    clip_text,
    clip_text_projected,
    clip_tokenizer,
    finish,
    kl_vae,
    seeded,
    t5_text,
    t5_tokenizer,
)

__all__ = ["flux", "sd3"]


def sd3() -> StableDiffusion3Pipeline:
    """Returns SD3 with 2 joint blocks of 4 heads x 8 over 8 x 8 image tokens, and 3 text encoders.

    Two blocks, because the last one drops its text half: a single block would not be complete.
    """
    with seeded():
        return finish(
            StableDiffusion3Pipeline(
                transformer=SD3Transformer2DModel(
                    sample_size=16,
                    patch_size=2,
                    in_channels=4,
                    out_channels=4,
                    num_layers=2,
                    num_attention_heads=4,
                    attention_head_dim=8,
                    caption_projection_dim=32,
                    joint_attention_dim=64,  # the two CLIP states side by side, T5 as wide
                    pooled_projection_dim=32 + 32,
                    pos_embed_max_size=16,
                ),
                vae=kl_vae(
                    use_quant_conv=False,
                    use_post_quant_conv=False,
                    shift_factor=0.0609,
                    scaling_factor=1.5035,
                ),
                text_encoder=clip_text_projected(32),
                text_encoder_2=clip_text_projected(32),
                text_encoder_3=t5_text(64),
                tokenizer=clip_tokenizer(),
                tokenizer_2=clip_tokenizer(),
                tokenizer_3=t5_tokenizer(),
                scheduler=FlowMatchEulerDiscreteScheduler(),
            )
        )


def flux() -> FluxPipeline:
    """Returns Flux with one double and one single block of 2 heads x 16 over 8 x 8 image tokens."""
    with seeded():
        return finish(
            FluxPipeline(
                transformer=FluxTransformer2DModel(
                    patch_size=1,
                    in_channels=4,  # one latent channel, packed 2 x 2
                    num_layers=1,
                    num_single_layers=1,
                    num_attention_heads=2,
                    attention_head_dim=16,
                    joint_attention_dim=32,
                    pooled_projection_dim=32,
                    axes_dims_rope=(4, 4, 8),
                ),
                vae=kl_vae(
                    latent_channels=1,
                    use_quant_conv=False,
                    use_post_quant_conv=False,
                    shift_factor=0.0609,
                    scaling_factor=1.5035,
                ),
                text_encoder=clip_text(32),
                text_encoder_2=t5_text(32),
                tokenizer=clip_tokenizer(),
                tokenizer_2=t5_tokenizer(),
                scheduler=FlowMatchEulerDiscreteScheduler(),
            )
        )
