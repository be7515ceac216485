"""Tiny video transformers: CogVideoX (joint attention, text first) and Wan (cross-attention)."""

from __future__ import annotations

from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.autoencoders import AutoencoderKLWan

from tests.models.parts import finish, seeded, t5_text, t5_tokenizer

__all__ = ["cogvideox", "wan"]


def cogvideox() -> CogVideoXPipeline:
    """Returns CogVideoX with 2 blocks of 2 heads x 16 over 3 x 4 x 4 tokens, rotary embeddings."""
    with seeded():
        return finish(
            CogVideoXPipeline(
                transformer=CogVideoXTransformer3DModel(
                    num_attention_heads=2,
                    attention_head_dim=16,
                    in_channels=4,
                    out_channels=4,
                    time_embed_dim=16,
                    text_embed_dim=32,
                    num_layers=2,
                    sample_width=8,
                    sample_height=8,
                    sample_frames=9,
                    patch_size=2,
                    temporal_compression_ratio=4,
                    max_text_seq_length=16,
                    use_rotary_positional_embeddings=True,
                ),
                vae=AutoencoderKLCogVideoX(
                    down_block_types=("CogVideoXDownBlock3D",) * 4,
                    up_block_types=("CogVideoXUpBlock3D",) * 4,
                    block_out_channels=(8, 8, 8, 8),
                    latent_channels=4,
                    layers_per_block=1,
                    norm_num_groups=2,
                    temporal_compression_ratio=4,
                ),
                text_encoder=t5_text(32),
                tokenizer=t5_tokenizer(),
                scheduler=CogVideoXDDIMScheduler(),
            )
        )


def wan() -> WanPipeline:
    """Returns Wan with 2 blocks of 2 heads x 12 over frames of 4 x 4 tokens."""
    with seeded():
        return finish(
            WanPipeline(
                transformer=WanTransformer3DModel(
                    patch_size=(1, 2, 2),
                    num_attention_heads=2,
                    attention_head_dim=12,
                    in_channels=16,
                    out_channels=16,
                    text_dim=32,
                    freq_dim=16,
                    ffn_dim=48,
                    num_layers=2,
                    cross_attn_norm=True,
                    qk_norm="rms_norm_across_heads",
                    rope_max_seq_len=32,
                ),
                vae=AutoencoderKLWan(
                    base_dim=3,
                    z_dim=16,
                    dim_mult=[1, 1, 1, 1],
                    num_res_blocks=1,
                    temperal_downsample=[False, True, True],
                ),
                text_encoder=t5_text(32),
                tokenizer=t5_tokenizer(),
                scheduler=FlowMatchEulerDiscreteScheduler(),
            )
        )
