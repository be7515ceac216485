"""CLIP's image embeddings as features: of any CLIP model, or of the embedded one."""

from __future__ import annotations

from pathlib import Path

from dq import checkpoints
from dq.eval.clip import Clip
from dq.eval.features import Extractor, extractors

__all__ = ["clip", "emoji_clip"]

_DEFAULT = "openai/clip-vit-base-patch32"


@extractors.register("clip")
def clip(weights: Path | None, rule: str, device: str) -> Extractor:
    """Return a CLIP model's embeddings; by default those of OpenAI's ViT-B/32 from the hub."""
    found = Clip.load(_DEFAULT if weights is None else str(weights), rule, device)
    name = f"clip ({found.name})"
    return Extractor(name, found.dimension, found.edge, rule, "see the model", found.embed_resized)


@extractors.register("emoji-clip")
def emoji_clip(weights: Path | None, rule: str, device: str) -> Extractor:
    """Return the embeddings of the CLIP model inside the package: small, offline, for emoji."""
    found = Clip.load(str(weights or checkpoints.path("emoji-clip")), rule, device)
    licence = "Apache-2.0"
    return Extractor("emoji-clip", found.dimension, found.edge, rule, licence, found.embed_resized)
