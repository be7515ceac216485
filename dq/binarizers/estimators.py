"""Gradients of the sign: what each makes of a weight on the way forward and back.

An estimator is a function of normalized weights, whose standard deviation is 1 in every row (its
constants would be lost on weights of another size), and of how far training is, 0 to 1. It returns
what multiplies the scale: signs in the end, with a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dq.bases import signs
from dq.quantize import straight_through
from dq.registry import Registry

__all__ = ["Estimator", "biper", "estimators", "reste", "ste", "ste_sign"]

Estimator = Callable[[Tensor, float], Tensor]

estimators: Registry[Estimator] = Registry("estimator")

_RESTE_NEAR, _RESTE_FAR = 0.1, 1.5  # where ReSTE's gradient is constant, and where it ends
_RESTE_POWER = 3.0  # that it ends with
_BIPER_FREQUENCY = 20.0
_BIPER_REAL = 0.5  # share of the training in which the sine itself is the weight


def ste_sign(x: Tensor, window: float = 1.0) -> Tensor:
    """Return the signs of `x`, +1 of 0, with the gradient of the identity where |x| <= window."""
    inside = x if math.isinf(window) else torch.where(x.abs() <= window, x, x.detach())
    return straight_through(inside, signs(x))


@estimators.register("ste")
def ste(x: Tensor, progress: float) -> Tensor:
    """The identity's gradient everywhere (Bengio et al. 2013, arXiv 1308.3432).

    BinaryDM clips it where a weight is above 1, which no pretrained one is.
    """
    return ste_sign(x, math.inf)


@estimators.register("reste")
def reste(x: Tensor, progress: float) -> Tensor:
    """The gradient of a root that sharpens from 1 to 3 (ReSTE, Wu et al. 2023, arXiv 2308.06689).

    sign(x) |x|^(1/o), o = 1 + 2 (1 - cos(pi progress / 2)): between 0.1 and 1.5 standard deviations
    its derivative, nearer to 0 that of the chord, farther away none.
    """
    power = 1 + (_RESTE_POWER - 1) * (1 - math.cos(math.pi * progress / 2))
    size = x.detach().abs()
    slope = size.clamp_min(_RESTE_NEAR) ** ((1 - power) / power) / power
    slope = torch.where(size < _RESTE_NEAR, _RESTE_NEAR ** (1 / power) / _RESTE_NEAR, slope)
    slope = torch.where(size <= _RESTE_FAR, slope, 0.0)
    return straight_through(x * slope, signs(x))


@estimators.register("biper")
def biper(x: Tensor, progress: float) -> Tensor:
    """A sine first, then the sign of it with its gradient (BiPer, Vargas et al. 2024).

    arXiv 2404.01278: sin(20 x) for the first half of the training, sign(sin(20 x)) then. A sign can
    thus be had by a small step from anywhere.
    """
    wave = torch.sin(_BIPER_FREQUENCY * x)
    return wave if progress < _BIPER_REAL else ste_sign(wave, math.inf)
