"""Learned rounding: up or down for each weight, by gradient.

AdaRound (Nagel et al. 2020, arXiv 2004.10568, equations 21 to 25), on any grid, as Chen et al. 2024
(arXiv 2408.06995) use it for FP4 weights: the two levels around a weight take the place of floor
and ceiling. The reconstruction loss is exact for all captured inputs, since it only needs their
second moment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dq.quantize import dequantize, quantize
from dq.rounding.grid import between
from dq.rounding.moment import check_finite
from dq.scales import Scales, usable
from dq.spec import TensorSpec

__all__ = ["learned_rounding"]

_ZETA, _GAMMA = 1.1, -0.1  # stretch of the sigmoid
_WARM_UP = 0.2  # share of the steps without regularizer
_EXPONENTS = 20.0, 2.0  # of the regularizer, first and last
_STRENGTH = 20.0


def learned_rounding(
    weight: Tensor,
    scales: Scales,
    spec: TensorSpec,
    moment: Tensor,
    steps: int = 500,
    rate: float = 3e-2,
) -> Tensor:
    """Round a weight so that the output of its layer changes little.

    The loss of each row is measured in that of round-to-nearest, beside which the regularizer that
    decides between up and down then has its weight: the loss of the first, undecided state is zero,
    and says nothing about its size.

    Args:
        weight: `(N, K)` floating point.
        scales: As chosen for `spec`; they stay.
        spec: How the weight is quantized.
        moment: `(K, K)` float32, E[x x^T] of the layer's inputs.
        steps: Of Adam.
        rate: Its learning rate.

    Returns:
        `(N, K)` uint8 codes.

    Raises:
        DQError: If the moment is not finite.
    """
    check_finite(moment)
    weight = weight.detach().float()
    below, above, fraction, step, zeros = between(weight, scales, spec)
    gap = (above - below) * step
    start = (below - zeros) * step - weight  # the error of rounding everything down
    nearest = dequantize(quantize(weight, scales, spec), scales, spec) - weight
    unit = usable(((nearest @ moment) * nearest).mean(1, keepdim=True))
    logits = torch.logit((fraction - _GAMMA) / (_ZETA - _GAMMA)).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=rate)
    for index in range(steps):
        optimizer.zero_grad()
        with torch.enable_grad():
            share = (torch.sigmoid(logits) * (_ZETA - _GAMMA) + _GAMMA).clamp(0.0, 1.0)
            error = start + share * gap
            # The gradient of trace(e M e^T) is 2 e M: one product instead of three.
            loss = (error * (2.0 * (error.detach() @ moment) / unit)).sum()
            done = (index / steps - _WARM_UP) / (1.0 - _WARM_UP)
            if done >= 0.0:
                exponent = _EXPONENTS[0] + (_EXPONENTS[1] - _EXPONENTS[0]) * done
                loss = loss + _STRENGTH * (1.0 - (2.0 * share - 1.0).abs().pow(exponent)).sum()
        loss.backward()
        optimizer.step()
    up = torch.sigmoid(logits.detach()) * (_ZETA - _GAMMA) + _GAMMA >= 0.5
    return spec.grid.encode(torch.where(up, above, below))
