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
from dq.inputs import ChannelRange
from dq.method import methods
from dq.methods.changes import FittedChange, Site
from dq.plan import LayerSpec
from dq.transform import NO_TRANSFORM, Transform
from dq.trial import observed, output_error

__all__ = ["OutlierSuppression"]


_GAIN = 0.9  # of the error: what gains less is not worth the run time


@methods.register("outliers")
@dataclass(frozen=True)
class OutlierSuppression(FittedChange):
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
        """See `FittedChange.change`."""
        self.refuse(site.before, "shift and scale")
        tried = [
            (shift, threshold)
            for shift in ((False, True) if self.shift else (False,))
            for threshold in self.thresholds
        ]
        early = site.input.early
        errors = [self._error(site, _transform(early, *settings)) for settings in tried]
        best = min(range(len(tried)), key=errors.__getitem__)
        if errors[best] > _GAIN * self._error(site, NO_TRANSFORM):
            return None
        return _transform(site.input.range, *tried[best])

    def _error(self, site: Site, transform: Transform) -> float:
        """Return the error on inputs that the transform was not made of."""
        total = 0.0
        for name, layer in site.layers.items():
            spec, seen = _quick(site.specs[name], transform), site.input
            range = observed(layer, seen.samples, spec, transform, seen.early)
            total += output_error(layer, seen.samples, spec, range, transform)
        return total


def _transform(seen: ChannelRange, shift: bool, threshold: float) -> Transform:
    """Return the transform of a threshold, given as a share of the largest magnitude."""
    low, high = seen
    middle = (low + high) / 2 if shift else torch.zeros_like(low)
    reach = torch.maximum(high - middle, middle - low)
    scale = (reach / (threshold * reach.max()).clamp_min(1e-12)).clamp_min(1.0)
    return Transform(middle if shift else None, scale)


def _quick(spec: LayerSpec, transform: Transform) -> LayerSpec:
    """Return the spec of a trial: to search for the best range of the weight would take longest."""
    weight = dataclasses.replace(spec.weight, observer="absmax")
    return dataclasses.replace(spec, weight=weight, transform=transform.spec)
