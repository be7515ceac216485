"""Pre-shifted exponent bias: each input channel has its own power of two, kept in the weight.

LLM-FP4 (Liu et al. 2023, arXiv 2310.16836, section 4.2): a float format per channel is one per
tensor and an integer shift of the exponent for each channel. Powers of two move from input to
weight without any rounding. The shift spans what the exponent of the format can: 0 to 2^E - 1 down.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dq.errors import DQError
from dq.formats import FloatFormat
from dq.method import methods
from dq.methods.changes import FittedChange, Site
from dq.transform import Transform

__all__ = ["PreShift"]


@methods.register("preshift")
@dataclass(frozen=True)
class PreShift(FittedChange):
    """Bring the channels of floating-point inputs to one power of two."""

    def change(self, site: Site) -> Transform | None:
        """See `FittedChange.change`."""
        self.refuse(site.before, "an exponent bias")
        grids = {spec.input.grid for spec in site.specs.values() if spec.input is not None}
        exponents = {grid.exponent for grid in grids if isinstance(grid, FloatFormat)}
        if not exponents:
            raise DQError("its input is not floating point: an exponent bias is for such formats")
        span = (1 << max(exponents)) - 1
        reach = torch.maximum(-site.input.range.low, site.input.range.high)
        power = torch.frexp(reach).exponent - torch.frexp(reach.max()).exponent
        scale = torch.exp2(power.clamp(-span, 0).float())
        return Transform(scale=scale) if bool((scale != 1).any()) else None
