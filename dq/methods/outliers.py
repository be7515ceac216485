"""Outlier Suppression+: channels are centred, and those that stand out divided.

Wei et al. 2023, arXiv 2304.09145, equations 3 and 9: the shift is the middle of a channel,
z_j = (max_j + min_j) / 2; the scale max(1, max|x_j - z_j| / t) touches outliers only, and the
threshold t is the one of least output error, here among shares of the largest magnitude.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from dq.errors import DQError
from dq.method import methods
from dq.methods.changes import Change, Site
from dq.transform import NO_TRANSFORM, Transform
from dq.trial import output_error

__all__ = ["OutlierSuppression"]


@methods.register("outliers")
@dataclass(frozen=True)
class OutlierSuppression(Change):
    """Shift and scale the channels of inputs; where that does not help, leave them.

    Args:
        thresholds: Shares of the largest magnitude to try for t.
        shift: Whether channels are centred.
    """

    thresholds: tuple[float, ...] = (1.0, 0.7, 0.5, 0.35, 0.25)
    shift: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.thresholds or not all(0 < t <= 1 for t in self.thresholds):
            raise DQError(f"thresholds lists shares above 0 and up to 1, not {self.thresholds}")

    def change(self, site: Site) -> Transform | None:
        """See `Change.change`."""
        self.refuse(site.before, "shift and scale")
        low, high = site.range
        middle = (low + high) / 2 if self.shift else torch.zeros_like(low)
        reach = torch.maximum(high - middle, middle - low)
        tried = [NO_TRANSFORM]
        for threshold in self.thresholds:
            scale = (reach / (threshold * reach.max()).clamp_min(1e-12)).clamp_min(1.0)
            tried.append(Transform(middle if self.shift else None, scale))
        best = min(tried, key=lambda transform: self._error(site, transform))
        return None if best is NO_TRANSFORM else best

    def _error(self, site: Site, transform: Transform) -> float:
        return sum(
            output_error(
                layer,
                site.samples,
                dataclasses.replace(site.specs[name], transform=transform.spec),
                transform,
            )
            for name, layer in site.layers.items()
        )
