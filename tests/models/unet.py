"""Tiny U-Net pipelines: Stable Diffusion at two widths, and SDXL."""

from __future__ import annotations

from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from tests.models.parts import (
    clip_text,
    clip_text_projected,
    clip_tokenizer,
    finish,
    kl_vae,
    seeded,
)

__all__ = ["sd32", "sd64", "sdxl"]

_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _stable_diffusion(channels: tuple[int, int], cross: int) -> StableDiffusionPipeline:
    with seeded():
        return finish(
            StableDiffusionPipeline(
                unet=UNet2DConditionModel(
                    block_out_channels=channels,
                    layers_per_block=1,
                    sample_size=16,
                    in_channels=4,
                    out_channels=4,
                    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                    cross_attention_dim=cross,
                ),
                vae=kl_vae(),
                text_encoder=clip_text(cross),
                tokenizer=clip_tokenizer(),
                # The default clip_sample=True would cut latents at 1.
                scheduler=DDIMScheduler(
                    **_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1
                ),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        )


def sd32() -> StableDiffusionPipeline:
    """Returns Stable Diffusion, channels (32, 64), text width 32: groups of 32 fit any linear."""
    return _stable_diffusion((32, 64), cross=32)


def sd64() -> StableDiffusionPipeline:
    """Returns Stable Diffusion, channels (64, 128), text width 64: groups of 64 fit any linear."""
    return _stable_diffusion((64, 128), cross=64)


def sdxl() -> StableDiffusionXLPipeline:
    """Returns SDXL, channels (32, 64), text widths 32 and 32: groups of 32 fit any linear."""
    with seeded():
        return finish(
            StableDiffusionXLPipeline(
                unet=UNet2DConditionModel(
                    block_out_channels=(32, 64),
                    layers_per_block=2,
                    sample_size=16,
                    in_channels=4,
                    out_channels=4,
                    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                    attention_head_dim=(2, 4),
                    use_linear_projection=True,
                    addition_embed_type="text_time",
                    addition_time_embed_dim=16,
                    transformer_layers_per_block=(1, 2),
                    projection_class_embeddings_input_dim=6 * 16 + 32,
                    cross_attention_dim=32 + 32,
                ),
                vae=kl_vae(),
                text_encoder=clip_text(32),
                text_encoder_2=clip_text_projected(32),
                tokenizer=clip_tokenizer(),
                tokenizer_2=clip_tokenizer(),
                scheduler=EulerDiscreteScheduler(
                    **_BETAS, steps_offset=1, timestep_spacing="leading"
                ),
                add_watermarker=False,
            )
        )
