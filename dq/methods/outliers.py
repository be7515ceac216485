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
from dq.plan import LayerSpec
from dq.transform import NO_TRANSFORM, Transform
from dq.trial import observed, output_error

__all__ = ["OutlierSuppression"]


_GAIN = 0.9  # of the error: what gains less is not worth the run time


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
        tried = [NO_TRANSFORM]
        for shift in (False, True) if self.shift else (False,):
            low, high = site.range
            middle = (low + high) / 2 if shift else torch.zeros_like(low)
            reach = torch.maximum(high - middle, middle - low)
            for threshold in self.thresholds:
                scale = (reach / (threshold * reach.max()).clamp_min(1e-12)).clamp_min(1.0)
                tried.append(Transform(middle if shift else None, scale))
        errors = [self._error(site, transform) for transform in tried]
        best = min(range(len(tried)), key=errors.__getitem__)
        return tried[best] if errors[best] < _GAIN * errors[0] else None

    def _error(self, site: Site, transform: Transform) -> float:
        total = 0.0
        for name, layer in site.layers.items():
            spec = _quick(site.specs[name], transform)
            range = observed(layer, site.samples, spec, transform, site.range)
            total += output_error(layer, site.samples, spec, range, transform)
        return total


def _quick(spec: LayerSpec, transform: Transform) -> LayerSpec:
    """Return the spec of a trial: to search for the best range of the weight would take longest."""
    weight = dataclasses.replace(spec.weight, observer="absmax")
    return dataclasses.replace(spec, weight=weight, transform=transform.spec)
