"""What a rounded weight does to the output of its layer."""

from __future__ import annotations

import torch
from torch import Tensor

from dq.quantize import dequantize
from dq.scales import Scales
from dq.spec import TensorSpec

__all__ = ["better", "output_error"]


def output_error(
    codes: Tensor, weight: Tensor, scales: Scales, spec: TensorSpec, moment: Tensor
) -> Tensor:
    """Return the mean squared error of each output channel.

    Args:
        codes: `(N, K)` uint8.
        weight: `(N, K)` float32, what they stand for.
        scales: Of the codes.
        spec: Of the codes.
        moment: `(K, K)` float32, E[x x^T].

    Returns:
        `(N,)` float32.
    """
    error = dequantize(codes, scales, spec) - weight.float()
    return ((error @ moment) * error).sum(1)


def better(
    candidates: tuple[Tensor, ...],
    weight: Tensor,
    scales: Scales,
    spec: TensorSpec,
    moment: Tensor,
) -> Tensor:
    """Return, for each output channel, the codes of least output error; the first of equals."""
    errors = torch.stack([output_error(c, weight, scales, spec, moment) for c in candidates])
    chosen = errors.argmin(0)
    return torch.stack(candidates)[chosen, torch.arange(len(weight), device=weight.device)]
