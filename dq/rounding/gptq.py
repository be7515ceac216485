"""GPTQ: column by column, each rounding error spread over the columns still to come.

Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv 2210.17323, algorithm 1; columns in the order of the diagonal ("act order"),
with scales that were chosen before ("static groups"). Any grid will do: only what a column is
rounded to changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dq.bases import decode_signs, encode_signs
from dq.rounding.grid import spread
from dq.rounding.moment import check_finite
from dq.scales import Scales
from dq.spec import TensorSpec

__all__ = ["gptq"]

_BLOCK = 128  # columns whose errors reach the rest of the weight at once
_DAMPINGS = (1.0, 10.0, 100.0)  # tried in turn until the moment can be factored


def gptq(
    weight: Tensor, scales: Scales, spec: TensorSpec, moment: Tensor, damping: float = 0.01
) -> Tensor:
    """Round a weight so that the output of its layer changes little.

    Args:
        weight: `(N, K)` floating point.
        scales: As chosen for `spec`; they stay.
        spec: How the weight is quantized.
        moment: `(K, K)` float32, E[x x^T] of the layer's inputs.
        damping: Added to the diagonal of the moment, as a share of its mean.

    Returns:
        `(N, K)` uint8 codes.

    Raises:
        DQError: If the moment is not finite.
    """
    rows, columns = weight.shape
    check_finite(moment)
    rounding = (_Signs if spec.is_binary else _Levels)(scales, spec, rows, columns)
    order = torch.argsort(moment.diagonal(), descending=True, stable=True)
    left = weight.detach().float()[:, order]
    spreading = _spreading(moment[order][:, order], damping)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    for start in range(0, columns, _BLOCK):
        block = slice(start, min(start + _BLOCK, columns))
        # Transposed, so that a column is one run of memory.
        part = left[:, block].t().contiguous()
        errors = torch.empty_like(part)
        within = spreading[block, block]
        for index in range(len(part)):
            column = start + index
            code, rounded = rounding(part[index], int(order[column]))
            codes[:, order[column]] = code
            error = (part[index] - rounded) / within[index, index]
            part[index + 1 :].addr_(within[index, index + 1 :], error, alpha=-1.0)
            errors[index] = error
        left[:, block.stop :].addmm_(errors.t(), spreading[block, block.stop :], alpha=-1.0)
    return codes


class _Levels:
    """Rounds a column to the levels of a format: returns codes and values, `(N,)` each."""

    def __init__(self, scales: Scales, spec: TensorSpec, rows: int, columns: int) -> None:
        self.grid = spec.grid
        self.step, self.zero = spread(scales, rows, columns)

    def __call__(self, x: Tensor, column: int) -> tuple[Tensor, Tensor]:
        step = self.step[:, column]
        levels = x / step
        if self.zero is not None:
            levels = torch.round(levels) + self.zero[:, column]
        code = self.grid.encode(levels)
        rounded = self.grid.decode(code)
        if self.zero is not None:
            rounded = rounded - self.zero[:, column]
        return code, rounded * step


class _Signs:
    """The same to sums of signs."""

    def __init__(self, scales: Scales, spec: TensorSpec, rows: int, columns: int) -> None:
        self.scales, self.each = scales, columns // scales.step.shape[1]

    def __call__(self, x: Tensor, column: int) -> tuple[Tensor, Tensor]:
        block = column // self.each
        one = (s if s is None else s[:, min(block, s.shape[1] - 1), None] for s in self.scales)
        mine = Scales(*one)  # type: ignore[arg-type]
        code = encode_signs(x.view(-1, 1, 1), mine)
        return code.flatten(), decode_signs(code, mine).flatten()


def _spreading(moment: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the inverse moment: row k spreads the error of k."""
    eye = torch.eye(len(moment), device=moment.device)
    mean = moment.diagonal().mean()
    if mean > torch.finfo(torch.float32).tiny:
        moment = moment / mean  # in a unit whose inverse is a number
        for factor in _DAMPINGS:
            lower, failed = torch.linalg.cholesky_ex(moment + damping * factor * eye)
            if failed:
                continue
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper
    return eye  # nothing is known of the inputs: every column by itself
