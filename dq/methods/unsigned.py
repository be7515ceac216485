"""Unsigned inputs after SiLU and GELU: what is almost never negative needs no sign.

Such inputs are shifted by their smallest value (-0.28 and -0.17), and the bit of the sign goes to
the magnitude, as in Nunchaku (Li et al. 2024, arXiv 2411.05007) and MSFP (arXiv 2505.21591).
Asymmetric static integers have a zero point, and no use for this.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from dq.errors import DQError
from dq.formats import FloatFormat, IntFormat
from dq.method import methods
from dq.methods.changes import FittedChange, Site
from dq.plan import LayerSpec
from dq.spec import TensorSpec
from dq.transform import Transform

__all__ = ["Unsigned", "unsigned_spec"]


def unsigned_spec(spec: TensorSpec) -> TensorSpec | None:
    """Return the format with the sign's bit in the mantissa; None if there is no such format."""
    grid = spec.grid
    if not spec.symmetric or grid.low >= 0 or spec.scale_grid is not None:
        return None
    if isinstance(grid, IntFormat):
        return dataclasses.replace(spec, format=f"uint{grid.bits}")
    if isinstance(grid, FloatFormat):
        return dataclasses.replace(spec, format=f"ue{grid.exponent}m{grid.mantissa + 1}")
    return None


@methods.register("unsigned")
@dataclass(frozen=True)
class Unsigned(FittedChange):
    """Shift inputs that are almost never negative, and quantize them without a sign.

    Args:
        most: How far below zero they may reach, as a share of how far above.
    """

    most: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.most < 1:
            raise DQError(f"most is 0 or more and below 1, not {self.most}")

    def change(self, site: Site) -> Transform | None:
        """See `FittedChange.change`."""
        self.refuse(site.before, "a shift")
        low, high = site.input.range.low.min(), site.input.range.high.max()
        specs = [spec.input for spec in site.specs.values()]
        if not -low <= self.most * high or any(s is None or not unsigned_spec(s) for s in specs):
            return None
        return Transform(shift=torch.full_like(site.input.range.low, float(low.clamp_max(0))))

    def changed_spec(self, spec: LayerSpec, transform: Transform) -> LayerSpec:
        """See `Change.changed_spec`."""
        assert spec.input is not None  # layers with float inputs are not looked at
        found = unsigned_spec(spec.input)
        assert found is not None  # asked in `change`
        return dataclasses.replace(spec, input=found, transform=transform.spec)
