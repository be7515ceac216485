"""The text-conditioned denoiser of `emoji-unet`."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from dq.checkpoints.train.clip import Captions, tokenize
from dq.checkpoints.train.data import Artwork
from dq.checkpoints.train.latents import Latents

__all__ = ["UNetTrainee", "build"]

_DROP = 0.1


def build(width: int) -> UNet2DConditionModel:
    """Return the untrained denoiser (about 6.7 M parameters) for text states of `width`."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=width,
        norm_num_groups=16,
    )


class UNetTrainee:
    """Velocity prediction from noised latents, the timestep and a caption, which is empty in 10 %.

    Args:
        latents: The encoded pictures.
        art: Their captions and how often each picture is drawn.
        tok: The tokenizer.
        clip: The trained CLIP model, whose text tower stays as it is.
        batch: Pictures a step.
    """

    name = "unet"

    def __init__(
        self, latents: Latents, art: Artwork, tok: CLIPTokenizer, clip: CLIPModel, batch: int
    ) -> None:
        width = clip.text_embed_dim
        self.model = build(width).to(latents.device, memory_format=torch.channels_last)
        self.latents, self.weights, self.batch = latents, art.weights, batch
        self.captions = Captions(tok, art.emoji)
        self.states = _states(clip, self.captions.ids).to(latents.device)
        self.empty = _states(clip, tokenize(tok, [""]))[0].to(latents.device)

    def loss(self, generator: torch.Generator) -> Tensor:
        """Return the loss of one batch, see `Trainee`."""
        index = torch.multinomial(self.weights, self.batch, True, generator=generator)
        rows = self.captions.rows(index, generator)
        drop = torch.rand(len(index), 1, 1, generator=generator) < _DROP
        device = self.latents.device
        states = torch.where(drop.to(device), self.empty, self.states[rows.to(device)])
        batch = self.latents.noised(index, generator)
        x = batch.x.contiguous(memory_format=torch.channels_last)
        velocity = self.model(x, batch.t, encoder_hidden_states=states).sample
        return F.mse_loss(velocity.float(), batch.velocity)


@torch.no_grad()
def _states(clip: CLIPModel, ids: Tensor) -> Tensor:
    """The `(N, 32, width)` float32 states of `(N, 32)` token numbers."""
    device = next(clip.parameters()).device
    parts = [clip.eval().text_model(part.to(device)).last_hidden_state for part in ids.split(256)]
    return torch.cat(parts)
