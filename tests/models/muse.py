"""A tiny masked image transformer, which predicts tokens: aMUSEd."""

from __future__ import annotations

from diffusers import AmusedPipeline, AmusedScheduler, UVit2DModel, VQModel
from torch import nn

from tests.models.parts import clip_text_projected, clip_tokenizer, finish, seeded

__all__ = ["amused"]

CODES = 64
TEXT = 32


def amused() -> AmusedPipeline:
    """Returns aMUSEd over 8 x 8 tokens of 64 codes, with 2 blocks of 2 heads x 32.

    Like aMUSEd-512 it halves the picture before the blocks and doubles it again after them.
    """
    with seeded():
        pipe = AmusedPipeline(
            vqvae=_decoder(),
            tokenizer=clip_tokenizer(),
            text_encoder=clip_text_projected(TEXT),
            transformer=UVit2DModel(
                hidden_size=64,
                cond_embed_dim=TEXT,
                micro_cond_encode_dim=16,
                micro_cond_embed_dim=5 * 16,
                encoder_hidden_size=TEXT,
                vocab_size=CODES + 8,
                codebook_size=CODES,
                in_channels=32,
                block_out_channels=32,
                num_res_blocks=1,
                downsample=True,
                upsample=True,
                block_num_heads=2,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=128,
                sample_size=8,
            ),
            scheduler=AmusedScheduler(mask_token_id=CODES + 7),
        )
    return finish(pipe)


def _decoder() -> VQModel:
    """Returns a model whose images, of codes that look different, lie within [0, 1] mostly."""
    model = VQModel(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        num_vq_embeddings=CODES,
        mid_block_add_attention=False,
        lookup_from_codebook=True,
    )
    nn.init.normal_(model.quantize.embedding.weight)  # by default all codes are next to zero
    nn.init.constant_(model.decoder.conv_out.bias, 0.5)
    model.decoder.conv_out.weight.data.mul_(0.5)
    return model
