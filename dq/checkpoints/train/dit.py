"""The class-conditioned denoiser of `emoji-dit`, and its 1,000 classes."""

from __future__ import annotations

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.nn import functional as F

from dq.checkpoints.train.data import Artwork, Emoji
from dq.checkpoints.train.latents import Latents

__all__ = ["CLASSES", "DiTTrainee", "build", "chosen"]

# `DiTPipeline` takes 1000 for "no class", so there are exactly 1000 before it.
CLASSES = 1000
_DROP = 0.1
_PICTURES = (
    "Smileys & Emotion",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
)


def chosen(art: Artwork) -> list[int]:
    """Pick the picture of every class.

    The classes are, in Unicode order, the emoji that show a thing, an animal, a place or a face,
    without the 24 clock faces and the phases of the moon, which look alike; then body parts until
    there are 1,000. Flags, symbols, skin tones and people are left out.

    Returns:
        1,000 indices into `art.emoji`; the position is the class.
    """

    def shows(e: Emoji) -> bool:
        return not e.captions[0].startswith("clock face") and "moon symbol" not in e.captions[0]

    defaults = [(n, e) for n, e in enumerate(art.emoji) if e.default]
    things = [n for n, e in defaults if e.group in _PICTURES and shows(e)]
    parts = [n for n, e in defaults if e.subgroup == "body-parts"]
    return [*things, *parts][:CLASSES]


def build() -> DiTTransformer2DModel:
    """Return the untrained denoiser (about 5.7 M parameters, 256 tokens of 4 channels)."""
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=48,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        sample_size=16,
        patch_size=1,
        num_embeds_ada_norm=CLASSES,
    )
    for block in model.transformer_blocks:
        # Identity at the start, as in the paper (Peebles & Xie 2023, "adaLN-Zero").
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.3)
        # Every block would drop its label on its own; the loss drops the labels of all together.
        block.norm1.emb.class_embedder.dropout_prob = 0.0
        # On a CPU the backward pass of the fused attention is slower than plain matrix products.
        block.attn1.set_processor(AttnProcessor())
    nn.init.zeros_(model.proj_out_2.weight)
    nn.init.zeros_(model.proj_out_2.bias)
    return model


class DiTTrainee:
    """Velocity prediction from noised latents, the timestep and a class, which is "none" in 10 %.

    Args:
        latents: The encoded pictures.
        art: The pictures' names, which decide on the classes.
        batch: Pictures a step.
    """

    name = "dit"

    def __init__(self, latents: Latents, art: Artwork, batch: int) -> None:
        self.model = build().to(latents.device)
        self.latents, self.batch = latents, batch
        self.pictures = torch.tensor(chosen(art))

    def loss(self, generator: torch.Generator) -> Tensor:
        """Return the loss of one batch, see `Trainee`."""
        label = torch.randint(CLASSES, (self.batch,), generator=generator)
        batch = self.latents.noised(self.pictures[label], generator)
        drop = torch.rand(self.batch, generator=generator) < _DROP
        label = torch.where(drop, CLASSES, label).to(self.latents.device)
        velocity = self.model(batch.x, timestep=batch.t, class_labels=label).sample
        return F.mse_loss(velocity.float(), batch.velocity)
