"""The text-conditioned denoiser of `emoji-unet` with its text encoder."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from dq.checkpoints.train.clip import Captions, tokenize
from dq.checkpoints.train.data import Artwork
from dq.checkpoints.train.latents import Latents

__all__ = ["TextUNet", "UNetTrainee"]

_DROP = 0.1


class TextUNet(nn.Module):
    """An untrained denoiser (6.8 M parameters) and a copy of a text tower, trained together.

    The text tower starts as CLIP's. Frozen, as in Stable Diffusion, it slows a denoiser of this
    size down: what a name looks like would have to be learned by the few layers behind it alone.

    Args:
        clip: The trained CLIP model.
    """

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.text: Any = copy.deepcopy(clip.text_model).requires_grad_(True)
        self.unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(64, 128, 128),
            layers_per_block=1,
            attention_head_dim=4,
            cross_attention_dim=clip.text_embed_dim,
            norm_num_groups=16,
        )

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """Predict the velocity.

        Args:
            x: `(B, 4, 16, 16)` noised latents.
            t: `(B,)` timesteps.
            ids: `(B, 32)` token numbers.

        Returns:
            `(B, 4, 16, 16)`.
        """
        states = self.text(ids).last_hidden_state
        return self.unet(x, t, encoder_hidden_states=states).sample


class UNetTrainee:
    """Velocity prediction from noised latents, the timestep and a caption, which is empty in 10 %.

    Args:
        latents: The encoded pictures.
        art: Their captions and how often each picture is drawn.
        tok: The tokenizer.
        clip: The trained CLIP model.
        batch: Pictures a step.
    """

    name = "unet"

    def __init__(
        self, latents: Latents, art: Artwork, tok: CLIPTokenizer, clip: CLIPModel, batch: int
    ) -> None:
        model = TextUNet(clip).to(latents.device)
        model.unet.to(memory_format=torch.channels_last)
        # On a CPU the backward pass of the fused attention is slower than plain matrix products.
        model.text.set_attn_implementation("eager")
        model.unet.set_attn_processor(AttnProcessor())
        self.model: nn.Module = model
        self.latents, self.weights, self.batch = latents, art.weights, batch
        self.captions = Captions(tok, art.emoji)
        self.empty = tokenize(tok, [""])

    def loss(self, generator: torch.Generator) -> Tensor:
        """Return the loss of one batch, see `Trainee`."""
        index = torch.multinomial(self.weights, self.batch, True, generator=generator)
        rows = self.captions.rows(index, generator)
        drop = torch.rand(len(index), 1, generator=generator) < _DROP
        ids = torch.where(drop, self.empty, self.captions.ids[rows])
        batch = self.latents.noised(index, generator)
        x = batch.x.contiguous(memory_format=torch.channels_last)
        velocity = self.model(x, batch.t, ids.to(self.latents.device))
        return F.mse_loss(velocity.float(), batch.velocity)
