"""A weight seen on its grid, column by column."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dq.errors import DQError
from dq.scales import Scales
from dq.spec import TensorSpec

__all__ = ["Between", "between", "spread"]


def spread(scales: Scales, rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
    """Return step and zero of each weight.

    Args:
        scales: `(r, g)`.
        rows: N.
        columns: K.

    Returns:
        The steps `(N, K)`, and the zeros likewise; None for symmetric scales.
    """

    def over(x: Tensor) -> Tensor:
        return x.repeat_interleave(columns // x.shape[1], 1).expand(rows, columns)

    return over(scales.step), None if scales.zero is None else over(scales.zero)


class Between(NamedTuple):
    """Where each weight lies on its grid, all `(N, K)` float32.

    Attributes:
        below: The level below it; it is `(level - zeros) * step` of the weight's own.
        above: The level above; both are the same outside of the grid.
        share: Of the way from one to the other, 0 to 1; 0 outside.
        step: Distance between neighbouring integers.
        zeros: Zero points, or 0 for symmetric scales.
    """

    below: Tensor
    above: Tensor
    share: Tensor
    step: Tensor
    zeros: Tensor | float


def between(weight: Tensor, scales: Scales, spec: TensorSpec) -> Between:
    """Return where each weight lies on its grid.

    Args:
        weight: `(N, K)` floating point.
        scales: As chosen for `spec`.
        spec: How the weight is quantized.

    Raises:
        DQError: If it is a sum of several bases, whose levels lie differently in every block.
    """
    if spec.bases > 1:
        raise DQError(f"{spec}: its levels lie on no common grid; round by gptq, or to nearest")
    step, zero = spread(scales, *weight.shape)
    zeros = 0.0 if zero is None else zero
    place = weight.detach().float() / step + zeros
    below, above = spec.grid.around(place)
    share = ((place - below) / (above - below).clamp_min(1e-12)).clamp(0.0, 1.0)
    return Between(below, above, share, step, zeros)
