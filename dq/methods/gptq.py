"""GPTQ as a step of a recipe (Frantar et al. 2023, arXiv 2210.17323); see `dq.rounding.gptq`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dq.errors import DQError
from dq.method import methods
from dq.methods.rounding import Rounding
from dq.rounding.gptq import gptq
from dq.scales import Scales
from dq.spec import TensorSpec

__all__ = ["GPTQ"]


@methods.register("gptq")
@dataclass(frozen=True)
class GPTQ(Rounding):
    """Round column by column, and spread each error over the columns still to come.

    Args:
        damping: Added to the diagonal of the second moment, as a share of its mean.
    """

    damping: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.damping <= 0:
            raise DQError(f"damping is above 0, not {self.damping}")

    def codes(self, weight: Tensor, scales: Scales, spec: TensorSpec, moment: Tensor) -> Tensor:
        """See `Rounding.codes`."""
        return gptq(weight, scales, spec, moment, self.damping)
