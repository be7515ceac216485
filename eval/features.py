"""What images are compared by: a registry of feature extractors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dq.errors import DQError
from dq.eval.images import check_images
from dq.eval.resize import RULES, resize
from dq.registry import Registry

__all__ = ["Extractor", "Maker", "check_dimensions", "extractors", "of_module"]


@dataclass(frozen=True)
class Extractor:
    """A network that maps images to features, and how images are brought to it.

    Attributes:
        name: What reports call it.
        dimension: Features of an image.
        edge: Pixels of the square images that it takes.
        rule: How they come to that size; see `dq.eval.resize`.
        licence: Of the weights.
        embed: Maps `(N, 3, edge, edge)` float32 of 0 to 255 to `(N, dimension)` float32.
    """

    name: str
    dimension: int
    edge: int
    rule: str
    licence: str
    embed: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the features of `(N, 3, H, W)` uint8 images, float32.

        Raises:
            DQError: If they are something else.
        """
        features = self.embed(resize(check_images(images), self.edge, self.rule))
        if features.shape != (len(images), self.dimension):
            raise DQError(
                f"extractor {self.name} gave features of shape {tuple(features.shape)} for "
                f"{len(images)} images; expected ({len(images)}, {self.dimension})"
            )
        return features.float().cpu()

    def over(self, batches: Iterable[Tensor]) -> Tensor:
        """Return the features of all images of some batches; one batch is in memory at a time."""
        return torch.cat([self(batch) for batch in batches])


def check_dimensions(one: int, two: int) -> None:
    """Refuse features that different extractors have made.

    Raises:
        DQError: If the numbers of dimensions differ.
    """
    if one != two:
        raise DQError(
            f"features of {one} and of {two} dimensions cannot be compared; "
            "use the extractor that the reference was made with"
        )


Maker = Callable[[Path | None, str, str], Extractor]
"""Makes an extractor of (weights, resize rule, device); None: those that come with it."""

extractors: Registry[Maker] = Registry("feature extractor", home="dq.eval.extractors")


def of_module(
    module: nn.Module, edge: int, rule: str = "clean", licence: str = "unknown"
) -> Extractor:
    """Return any module as an extractor.

    Args:
        module: Maps `(N, 3, edge, edge)` float32 of 0 to 255 to `(N, d)`, and has an attribute
            `num_features`, d.
        edge: Pixels.
        rule: One of `dq.eval.resize.RULES`.
        licence: Of its weights.

    Raises:
        DQError: If it does not say how many features it has.
    """
    if rule not in RULES:
        raise DQError(f"resize rule {rule!r}: choose {', '.join(RULES)}")
    count = getattr(module, "num_features", None)
    if not isinstance(count, int):
        raise DQError(f"{type(module).__name__} has no num_features: set it to the number of them")
    return Extractor(type(module).__name__, count, edge, rule, licence, module.eval())
