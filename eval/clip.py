"""CLIP models: embeddings of images and texts, and the score of a picture for its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from dq.errors import DQError
from dq.eval.images import check_images
from dq.eval.resize import resize

__all__ = ["Clip"]

_TEXTS = 64  # embedded at a time


@dataclass(frozen=True)
class Clip:
    """A CLIP model with what goes before it.

    Attributes:
        name: Folder or hub name.
        model: `CLIPModel`.
        tokenizer: Of its text tower.
        edge: Pixels of the images that it takes.
        mean: Of the channels, of 1.
        std: Likewise.
        rule: How images come to its size.
    """

    name: str
    model: Any
    tokenizer: Any
    edge: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rule: str = "clean"

    @classmethod
    def load(cls, name: str, rule: str = "clean", device: str = "cpu") -> Self:
        """Load a CLIP model from a folder or the hub.

        Raises:
            DQError: If there is none.
        """
        if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
            raise DQError(f"{name} is not the folder of a CLIP model: it has no config.json")
        try:
            model = CLIPModel.from_pretrained(name).to(device).eval()  # type: ignore[arg-type]
            tokenizer = AutoTokenizer.from_pretrained(name)
            before = CLIPImageProcessorPil.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise DQError(
                f"CLIP model {name!r} could not be loaded ({str(error).splitlines()[0]}); give a "
                "folder with --weights, or use the embedded one: --features emoji-clip"
            ) from error
        edge = int(model.config.vision_config.image_size)
        mean, std = tuple(before.image_mean), tuple(before.image_std)
        return cls(name, model, tokenizer, edge, mean, std, rule)

    @property
    def dimension(self) -> int:
        """Numbers of an embedding."""
        return int(self.model.config.projection_dim)

    def embed_resized(self, images: Tensor) -> Tensor:
        """Return embeddings of `(N, 3, edge, edge)` images of 0 to 255."""
        device = self.model.device
        mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (self.mean, self.std))
        x = (images.to(device) / 255 - mean) / std
        embeddings: Tensor = _pooled(self.model.get_image_features(pixel_values=x))
        return embeddings

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Return embeddings `(N, d)` of `(N, 3, H, W)` uint8 images, float32.

        Raises:
            DQError: If they are not uint8: floats are scaled by some and not by others.
        """
        resized = resize(check_images(images), self.edge, self.rule)
        return self.embed_resized(resized).float().cpu()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return embeddings `(N, d)`, float32. Longer texts than the model reads are cut."""
        found = []
        for start in range(0, len(texts), _TEXTS):
            part = self.tokenizer(
                list(texts[start : start + _TEXTS]), padding=True, truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).to(self.model.device)  # fmt: skip
            found.append(_pooled(self.model.get_text_features(**part)).float().cpu())
        return torch.cat(found)

    def scores(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Return the CLIP score of each image for its text.

        Hessel et al., "CLIPScore" (arXiv 2104.08718), in the scale of torchmetrics: 100 times the
        cosine, not below 0.

        Args:
            images: `(N, 3, H, W)` uint8.
            texts: N prompts.

        Returns:
            `(N,)` float32, 0 to 100.

        Raises:
            DQError: If the numbers differ.
        """
        if len(images) != len(texts):
            raise DQError(f"{len(images)} images cannot be scored for {len(texts)} prompts")
        return self.scores_of(self.embed_images(images), self.embed_texts(texts))

    @staticmethod
    def scores_of(images: Tensor, texts: Tensor) -> Tensor:
        """Return the scores of embeddings `(N, d)`, pair by pair."""
        return 100 * torch.cosine_similarity(images, texts).clamp_min(0)


def _pooled(output: Any) -> Tensor:
    """Return the embedding: transformers 5 wraps it, earlier ones gave it as it is."""
    found: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return found
