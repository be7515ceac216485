"""Learned rounding by signs as a step of a recipe: SignRound (Cheng et al. 2023, arXiv 2309.05516).

The paper tunes whole blocks, and clipping ranges with them; this step is AdaRound's cheap sister
and rounds layer by layer, see `dq.rounding.signed`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dq.errors import DQError
from dq.method import methods
from dq.methods.rounding import Rounding
from dq.rounding.signed import signed_rounding
from dq.scales import Scales
from dq.spec import TensorSpec

__all__ = ["SignRound"]


@methods.register("signround")
@dataclass(frozen=True)
class SignRound(Rounding):
    """Learn for each weight whether it goes up or down, by signed gradients.

    Args:
        steps: Of signed gradient descent, for each layer.
        rate: Of the first step, as a share of the gap between two levels; 0 for 1 / steps.
    """

    steps: int = 200
    rate: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.rate < 0:
            raise DQError(f"steps is above 0 and rate 0 or more, not {self.steps} and {self.rate}")

    def codes(self, weight: Tensor, scales: Scales, spec: TensorSpec, moment: Tensor) -> Tensor:
        """See `Rounding.codes`."""
        return signed_rounding(weight, scales, spec, moment, self.steps, self.rate)
