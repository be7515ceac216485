"""The four parts in the order of training: which plan, and how each is built and found again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from dq import checkpoints
from dq.checkpoints.train import clip, data, dit, unet, vae
from dq.checkpoints.train.latents import Latents
from dq.checkpoints.train.loop import Plan, Trainee

__all__ = ["PLANS", "Work", "exported"]

PLANS = {
    "vae": Plan(5000, 1e-3, batch=8, decay=1700, ema=0.999),
    "clip": Plan(2000, 8e-4, batch=128, decay=700, ema=0.998),
    "unet": Plan(8000, 1e-3, batch=32, decay=3400, muon=True),
    "dit": Plan(5000, 1e-3, batch=32, decay=1200),
}
# Of every part, the modules it is exported as: prefix of the weights, folder, class.
_MODULES: dict[str, list[tuple[str, str, Any]]] = {
    "vae": [("", "emoji-unet/vae", AutoencoderKL)],
    "clip": [("", "emoji-clip", CLIPModel)],
    "unet": [
        ("unet.", "emoji-unet/unet", UNet2DConditionModel),
        ("text.", "emoji-unet/text_encoder", CLIPTextModel),
    ],
    "dit": [("", "emoji-dit/transformer", DiTTransformer2DModel)],
}


@dataclass(frozen=True)
class Work:
    """Where the artwork and the states of the training lie, and what was trained so far.

    Attributes:
        cache: The folder of both.
        device: Where to compute.
    """

    cache: Path
    device: str = "cpu"

    def folder(self, part: str) -> Path:
        """Return the folder of the states of `part`."""
        return self.cache / "train" / part

    @cached_property
    def art(self) -> data.Artwork:
        """All pictures and captions."""
        return data.load(self.cache / "emoji")

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        """The tokenizer; the captions alone decide on it."""
        return clip.tokenizer(self.art)

    @cached_property
    def vae(self) -> AutoencoderKL:
        """The averaged weights of the autoencoder."""
        return self.trained("vae", vae.build())

    @cached_property
    def clip(self) -> CLIPModel:
        """The averaged weights of the CLIP model."""
        return self.trained("clip", clip.build(self.tokenizer))

    @cached_property
    def latents(self) -> Latents:
        """All pictures encoded, which is kept in a file; sets the autoencoder's scale."""
        file, state = self.folder("vae") / "latents.pt", self.folder("vae") / "state.pt"
        fresh = file.exists() and state.exists() and file.stat().st_mtime > state.stat().st_mtime
        mean, std = torch.load(file) if fresh else vae.encode(self.vae, self.art)
        if not fresh:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save((mean, std), file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
        latents = Latents(mean, std, self.device)
        self.vae.register_to_config(scaling_factor=latents.scale)
        return latents

    def trainee(self, part: str, batch: int) -> Trainee:
        """Build the network of `part` and its loss, untrained."""
        if part == "vae":
            return vae.VaeTrainee(self.art, self.device, batch)
        if part == "clip":
            return clip.ClipTrainee(self.art, self.tokenizer, self.device, batch)
        if part == "unet":
            return unet.UNetTrainee(self.latents, self.art, self.tokenizer, self.clip, batch)
        return dit.DiTTrainee(self.latents, self.art, batch)

    def trained(self, part: str, model: Any) -> Any:
        """Give `model` the averaged weights of the state, or of the package where there is none."""
        file = self.folder(part) / "state.pt"
        weights = torch.load(file, weights_only=True)["ema"] if file.exists() else exported(part)
        model.load_state_dict(weights)
        return model.to(self.device).eval().requires_grad_(False)

    def facts(self, part: str) -> dict[str, float]:
        """Return step, seconds and the last logged loss of `part`; empty without a state."""
        log = self.folder(part) / "log.jsonl"
        if not log.exists():
            return {}
        last: dict[str, float] = json.loads(log.read_text().splitlines()[-1])
        return last


def exported(part: str) -> dict[str, torch.Tensor]:
    """Return the weights of `part` that come with the package, as float32."""
    weights: dict[str, torch.Tensor] = {}
    for prefix, name, kind in _MODULES[part]:
        top, _, sub = name.partition("/")
        model: nn.Module = kind.from_pretrained(checkpoints.path(top) / sub)
        weights |= {prefix + key: value.float() for key, value in model.state_dict().items()}
    return weights
