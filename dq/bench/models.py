"""What is measured: random denoisers of a realistic size, or the denoiser of any checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import diffusers
import torch
from torch import nn

from dq.calibrate import CalibrationSpec
from dq.engine import quantize
from dq.pipelines.noise import NoiseSource
from dq.pipelines.pipeline import DQPipeline
from dq.recipe import Recipe

__all__ = ["RANDOM_MODELS", "Checkpoint", "RandomModel", "Subject", "subject"]

_SHORT = CalibrationSpec(n=4, steps=2, batch=2)  # ranges for timing; quality is measured elsewhere


class Subject(Protocol):
    """A denoiser in all the forms that are measured. Each call returns a model of its own."""

    @property
    def name(self) -> str:
        """What reports call it."""

    def plain(self, dtype: torch.dtype, seed: int) -> nn.Module:
        """Return it without quantization."""

    def quantized(self, recipe: Recipe, seed: int) -> nn.Module:
        """Return it quantized; everything that is not packed is bfloat16."""


def _short(recipe: Recipe, seed: int) -> Recipe:
    calibration = replace(_SHORT, prompts=recipe.calibration.prompts, seed=seed)
    return replace(recipe, calibration=calibration)


@dataclass(frozen=True)
class RandomModel:
    """A denoiser with seeded random weights; see `Subject`.

    Args:
        name: What reports call it.
        kind: Its class in diffusers.
        config: Arguments of the class.
    """

    name: str
    kind: str
    config: Mapping[str, Any]

    def plain(self, dtype: torch.dtype, seed: int) -> nn.Module:
        """See `Subject`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: nn.Module = getattr(diffusers, self.kind)(**self.config).eval()
        return nn.Module.to(model, dtype)  # diffusers' own `to` warns of casts

    def quantized(self, recipe: Recipe, seed: int) -> nn.Module:
        """See `Subject`."""
        model = self.plain(torch.bfloat16, seed)
        quantize(model, _short(recipe, seed), NoiseSource(model))
        return model


@dataclass(frozen=True)
class Checkpoint:
    """The denoiser of a pipeline on disk; see `Subject`.

    Args:
        name: Folder, hub name, or checkpoint of dq such as "emoji-unet".
    """

    name: str

    def plain(self, dtype: torch.dtype, seed: int) -> nn.Module:
        """See `Subject`."""
        model: nn.Module = self.pipeline(dtype).denoiser
        return model

    def quantized(self, recipe: Recipe, seed: int) -> nn.Module:
        """See `Subject`."""
        model: nn.Module = self.pipeline(torch.bfloat16, recipe, seed).denoiser
        return model

    def pipeline(self, dtype: torch.dtype, recipe: Recipe | None = None, seed: int = 0) -> Any:
        """Return the whole pipeline, quantized if a recipe is given."""
        short = None if recipe is None else _short(recipe, seed)
        return DQPipeline.from_pretrained(self.name, short, dtype=dtype)


_UNET = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 384),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 512,
}  # 51.5 M weights: 15.1 M in linears, 36.4 M in convolutions; 1,024 and 256 tokens
_DIT = {
    "sample_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 12,
    "num_attention_heads": 9,
    "attention_head_dim": 64,
}  # 85.1 M weights, 78.2 M of them in linears; 256 tokens

RANDOM_MODELS = {
    "unet": RandomModel("unet", "UNet2DConditionModel", _UNET),
    "dit": RandomModel("dit", "DiTTransformer2DModel", _DIT),
}


def subject(model: str | Subject) -> Subject:
    """Return what is meant by "unet" or "dit" (random weights) or by the name of a checkpoint."""
    if not isinstance(model, str):
        return model
    return RANDOM_MODELS.get(model) or Checkpoint(model)
