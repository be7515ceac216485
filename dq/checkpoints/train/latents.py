"""The pictures as latents, and the noise schedule both denoisers are trained and sampled with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler
from torch import Tensor

__all__ = ["Latents", "Noised", "scheduler"]


def scheduler() -> DDIMScheduler:
    """Return the scheduler of both pipelines.

    It predicts velocity and ends in pure noise (Lin et al. 2024, "Common diffusion noise schedules
    and sample steps are flawed"): else the white background would leak into what the denoiser is
    told is noise. `clip_sample` is off, because latents are not bounded by 1.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # what the pipeline insists on; it plays no part in trailing timesteps
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )


@dataclass(frozen=True)
class Noised:
    """A batch for a denoiser.

    Attributes:
        x: `(B, 4, 16, 16)` float32, the noised latents.
        t: `(B,)` int64 timesteps in [0, 1000).
        velocity: `(B, 4, 16, 16)` float32, the target (Salimans & Ho 2022, appendix D).
    """

    x: Tensor
    t: Tensor
    velocity: Tensor


class Latents:
    """All pictures encoded once, scaled to variance 1.

    Args:
        mean: `(N, 4, 16, 16)` float32 means of the posteriors, unscaled.
        std: Their standard deviations, of the same shape.
        device: Where batches are wanted.

    Attributes:
        scale: The `scaling_factor` of the autoencoder.
    """

    def __init__(self, mean: Tensor, std: Tensor, device: str) -> None:
        scale = float((mean.var() + std.square().mean()).rsqrt())
        self.scale = round(scale, 6)
        self.mean, self.std = (mean * self.scale).to(device), (std * self.scale).to(device)
        self.device = device
        alphas = scheduler().alphas_cumprod
        self._signal, self._noise = alphas.sqrt().to(device), (1 - alphas).sqrt().to(device)

    def noised(self, index: Tensor, generator: torch.Generator) -> Noised:
        """Draw latents, timesteps and noise for the pictures `index` (`(B,)` int64)."""
        shape = (2, len(index), *self.mean.shape[1:])
        spread, noise = torch.randn(shape, generator=generator).to(self.device)
        # One uniform draw in each of B equal parts: the loss of a batch varies less.
        t = (torch.arange(len(index)) + torch.rand(len(index), generator=generator)) / len(index)
        t = (1000 * t).long().to(self.device)
        signal = self._signal[t].view(-1, 1, 1, 1)
        sigma = self._noise[t].view(-1, 1, 1, 1)
        index = index.to(self.device)
        clean = self.mean[index] + self.std[index] * spread
        return Noised(signal * clean + sigma * noise, t, signal * noise - sigma * clean)
