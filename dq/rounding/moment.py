"""What all rounding methods ask of a second moment."""

from __future__ import annotations

import torch
from torch import Tensor

from dq.errors import DQError

__all__ = ["check_finite"]


def check_finite(moment: Tensor) -> None:
    """Refuse a second moment that would round every weight to nowhere.

    Raises:
        DQError: If it is not finite.
    """
    if not bool(torch.isfinite(moment).all()):
        raise DQError("the second moment of its inputs is not finite; calibrate in float32")
