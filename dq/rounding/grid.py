"""A weight seen on its grid, column by column."""

from __future__ import annotations

from torch import Tensor

from dq.scales import Scales

__all__ = ["spread"]


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
