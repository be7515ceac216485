"""Learned rounding as a step of a recipe: AdaRound (Nagel et al. 2020, arXiv 2004.10568).

On floating-point grids it is the rounding of Chen et al. 2024 (arXiv 2408.06995); see
`dq.rounding.learned`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dq.errors import DQError
from dq.method import methods
from dq.methods.rounding import Rounding
from dq.rounding.learned import learned_rounding
from dq.scales import Scales
from dq.spec import TensorSpec

__all__ = ["AdaRound"]


@methods.register("adaround")
@dataclass(frozen=True)
class AdaRound(Rounding):
    """Learn for each weight whether it goes up or down.

    Args:
        steps: Of Adam, for each layer.
        rate: Its learning rate.
    """

    steps: int = 500
    rate: float = 3e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.rate <= 0:
            raise DQError(f"steps and rate are above 0, not {self.steps} and {self.rate}")

    def codes(self, weight: Tensor, scales: Scales, spec: TensorSpec, moment: Tensor) -> Tensor:
        """See `Rounding.codes`."""
        return learned_rounding(weight, scales, spec, moment, self.steps, self.rate)
