"""Tiny real diffusers pipelines with seeded random weights, built offline.

The images are meaningless; the structure is that of the published checkpoints, so a test that
passes here exercises the layers, names and file layouts users have. `MODELS` is the registry to
parametrise tests over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn

from tests.models.dit import dit64, pixart64
from tests.models.mmdit import flux, sd3
from tests.models.muse import amused
from tests.models.parts import aligned
from tests.models.unet import sd32, sd64, sdxl
from tests.models.video import cogvideox, wan

__all__ = [
    "MODELS",
    "PROMPT",
    "VIDEOS",
    "ModelCase",
    "aligned",
    "amused",
    "cogvideox",
    "dit64",
    "flux",
    "pixart64",
    "sd3",
    "sd32",
    "sd64",
    "sdxl",
    "wan",
]

PROMPT = "a red fox in the snow"


@dataclass(frozen=True)
class ModelCase:
    """One tiny pipeline and how to run it.

    Attributes:
        name: Key in `MODELS`.
        build: Returns a new pipeline in float32 on the CPU, in eval mode; equal weights at every
            call.
        denoiser: Name of the pipeline's denoising component, `"unet"` or `"transformer"`.
        arguments: Keyword arguments of a 2-step run (guidance on where the model has it).
    """

    name: str
    build: Callable[[], DiffusionPipeline]
    denoiser: str
    arguments: Mapping[str, Any] = field(repr=False)

    def network(self, pipe: DiffusionPipeline) -> nn.Module:
        """Returns the denoiser of `pipe`."""
        network: nn.Module = getattr(pipe, self.denoiser)
        return network

    def call(self, pipe: DiffusionPipeline, seed: int = 0, **overrides: Any) -> np.ndarray:
        """Runs `pipe` for two steps from a seed.

        Args:
            pipe: A pipeline of this case: freshly built, reloaded or quantized, on any device.
            seed: Seed of the initial noise, drawn on the CPU so that devices agree.
            **overrides: Replace or extend `arguments`.

        Returns:
            Images (N, 32, 32, 3), float32 in [0, 1]. With `output_type="latent"` the final latents,
            float32: (N, 4, 16, 16), for Flux packed (N, 64, 4), for aMUSEd codes (N, 8, 8); DiT's
            pipeline always decodes.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        images = pipe(**{**self.arguments, "generator": generator, **overrides}).images
        if isinstance(images, torch.Tensor):
            images = images.detach().float().cpu().numpy()
        return np.asarray(images)


def _case(
    build: Callable[[], DiffusionPipeline], denoiser: str, **arguments: Any
) -> tuple[str, ModelCase]:
    common = {"num_inference_steps": 2, "output_type": "np"}
    name = build.__name__
    return name, ModelCase(name, build, denoiser, MappingProxyType(common | arguments))


MODELS: Mapping[str, ModelCase] = MappingProxyType(
    dict(
        [
            _case(sd32, "unet", prompt=PROMPT),
            _case(sd64, "unet", prompt=PROMPT),
            _case(sdxl, "unet", prompt=PROMPT),
            _case(dit64, "transformer", class_labels=[7]),
            _case(
                pixart64,
                "transformer",
                prompt=PROMPT,
                max_sequence_length=32,
                clean_caption=False,  # cleaning needs ftfy and bs4
                use_resolution_binning=False,  # binning knows only the published sizes
            ),
            _case(sd3, "transformer", prompt=PROMPT, max_sequence_length=32),
            # Flux alone does not take its default size from the transformer.
            _case(flux, "transformer", prompt=PROMPT, max_sequence_length=32, height=32, width=32),
            _case(amused, "transformer", prompt=PROMPT),
        ]
    )
)
"""Every tiny pipeline of images by name: sd32, sd64, sdxl, dit64, pixart64, sd3, flux, amused."""

VIDEOS: Mapping[str, ModelCase] = MappingProxyType(
    dict(
        _case(build, "transformer", prompt=PROMPT, max_sequence_length=16, height=64, width=64,
              num_frames=9)
        for build in (cogvideox, wan)
    )
)  # fmt: skip
"""Those of videos: cogvideox, wan; they put out frames, not images."""
