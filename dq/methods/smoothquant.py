"""SmoothQuant: large input channels are divided, and their weights multiplied.

Xiao et al. 2023, arXiv 2211.10438, equation 4:  s_j = max|X_j|^alpha / max|W_j|^(1 - alpha).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dq.errors import DQError
from dq.inputs import Seen
from dq.method import methods
from dq.methods.changes import FittedChange, Site
from dq.nn.changed import conv_groups
from dq.nn.layers import Layer
from dq.transform import Transform

__all__ = ["SmoothQuant", "Smoothing", "largest_weights", "smoothing"]

_LEAST = 1e-5  # of a magnitude, as a share of the largest: channels that are never used


def largest_weights(layer: Layer) -> Tensor:
    """Return the largest magnitude of the weights of each input channel, `(C,)` float32."""
    groups = conv_groups(layer)
    weight = layer.weight.detach().float().abs()
    rows, width = weight.shape[:2]
    return weight.reshape(groups, rows // groups, width, -1).amax((1, 3)).flatten()


def smoothing(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Return the scales of the input channels.

    Args:
        inputs: Largest magnitude of each input channel, `(C,)`.
        weights: Likewise of the weights that it meets.
        alpha: Share of the difficulty that weights take over, 0 to 1.
    """
    x = inputs.clamp_min(_LEAST * float(inputs.max())).clamp_min(1e-12)
    w = weights.clamp_min(_LEAST * float(weights.max())).clamp_min(1e-12)
    scale = x.pow(alpha) / w.pow(1 - alpha)
    return scale / scale.log().mean().exp()  # only ratios matter: keep weights near their size


@dataclass(frozen=True)
class Smoothing(FittedChange, ABC):
    """Move the difficulty of large input channels into weights. Subclasses say how large.

    Args:
        alpha: Share of it that weights take over, 0 to 1.
    """

    alpha: float = 0.5
    words: ClassVar[str]  # what errors call it

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise DQError(f"alpha is 0 to 1, not {self.alpha}")

    @abstractmethod
    def magnitudes(self, seen: Seen, weights: Tensor) -> Tensor:
        """Return the magnitude of each input channel, `(C,)`.

        Args:
            seen: What is known of the input.
            weights: Largest magnitude of the weights that each channel meets, `(C,)`.
        """

    def change(self, site: Site) -> Transform:
        """See `FittedChange.change`."""
        self.refuse(site.before, self.words)
        weights = torch.stack([largest_weights(layer) for layer in site.layers.values()]).amax(0)
        weights = weights.to(site.input.by_step.device)
        return Transform(scale=smoothing(self.magnitudes(site.input, weights), weights, self.alpha))


@methods.register("smoothquant")
@dataclass(frozen=True)
class SmoothQuant(Smoothing):
    """Move the difficulty of large input channels into weights."""

    words = "smoothing"

    def magnitudes(self, seen: Seen, weights: Tensor) -> Tensor:
        """Return the largest ones of the whole calibration; see `Smoothing.magnitudes`."""
        return torch.maximum(-seen.range.low, seen.range.high)
