"""The autoencoder: 64 px pictures to latents of 4 x 16 x 16 and back."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from dq.checkpoints.train.data import SIZE, Artwork

__all__ = ["VaeTrainee", "build", "encode", "psnr"]

_KL_WEIGHT = 3e-4


def build() -> AutoencoderKL:
    """Return the untrained autoencoder (downscaling by 4, about 1.5 M parameters)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
    )


class VaeTrainee:
    """Reconstruction (L1 and squared error) with a small KL term that keeps the latents smooth.

    Args:
        art: The pictures.
        device: Where to compute.
        batch: Pictures a step.
    """

    name = "vae"

    def __init__(self, art: Artwork, device: str, batch: int) -> None:
        self.model = build().to(device, memory_format=torch.channels_last)
        self.art, self.device, self.batch = art, device, batch

    def loss(self, generator: torch.Generator) -> Tensor:
        """Return the loss of one batch, see `Trainee`."""
        index = torch.randint(len(self.art.emoji), (self.batch,), generator=generator)
        seed = int(torch.randint(2**31, (), generator=generator))
        x = self.art.images(index).to(self.device).contiguous(memory_format=torch.channels_last)
        posterior = self.model.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(seed))
        y = self.model.decode(posterior.mean + posterior.std * noise.to(self.device)).sample
        error = (y - x).float()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return error.abs().mean() + error.square().mean() + _KL_WEIGHT * kl


@torch.no_grad()
def encode(vae: AutoencoderKL, art: Artwork, batch: int = 64) -> tuple[Tensor, Tensor]:
    """Encode all pictures once.

    Returns:
        The means and standard deviations of the latents, both `(N, 4, 16, 16)` float32, unscaled.
    """
    vae.eval()
    device = next(vae.parameters()).device
    mean, std = [], []
    for index in torch.arange(len(art.emoji)).split(batch):
        posterior = vae.encode(art.images(index).to(device)).latent_dist
        mean.append(posterior.mean.cpu())
        std.append(posterior.std.cpu())
    return torch.cat(mean), torch.cat(std)


@torch.no_grad()
def psnr(vae: AutoencoderKL, art: Artwork, mean: Tensor, batch: int = 64) -> Tensor:
    """Return the `(N,)` reconstruction PSNR of every picture in decibels (peak 255)."""
    vae.eval()
    device = next(vae.parameters()).device
    found = []
    for index in torch.arange(len(art.emoji)).split(batch):
        y = vae.decode(mean[index].to(device)).sample.clamp(-1, 1).cpu()
        error = F.mse_loss(y, art.images(index), reduction="none").mean((1, 2, 3))
        found.append(10 * torch.log10(4 / error))
    return torch.cat(found)
