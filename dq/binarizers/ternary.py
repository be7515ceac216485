"""Signs and zeros: three levels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dq.binarizers.binarizer import Binarizer, Exported
from dq.binarizers.registry import binarizers
from dq.errors import unknown
from dq.quantize import straight_through
from dq.spec import TensorSpec

__all__ = ["Ternary"]


@dataclass(frozen=True)
class _Rule:
    """Where zeros end, and what the others begin with, of `(N, G, n)` weights."""

    threshold: Callable[[Tensor], Tensor]
    scale: Callable[[Tensor, Tensor], Tensor]


def _mean(x: Tensor) -> Tensor:
    return x.abs().mean(-1, keepdim=True)


def _kept(x: Tensor, threshold: Tensor) -> Tensor:
    kept = x.abs() > threshold
    return (x.abs() * kept).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp_min(1)


def _everywhere(x: Tensor) -> Tensor:
    return x.abs().mean().expand(*x.shape[:2], 1)


_RULES: Mapping[str, _Rule] = {
    "twn": _Rule(lambda x: 0.7 * _mean(x), _kept),
    "tbt": _Rule(lambda x: 2 / 3 * _mean(x), lambda x, _: 4 / 3 * _mean(x)),
    "b158": _Rule(lambda x: 0.5 * _everywhere(x), lambda x, _: _everywhere(x)),
}


@binarizers.register("ternary")
class Ternary(Binarizer):
    """W ~ s t with t of -1, 0 and 1, s learned.

    | rule   | zero where                       | s begins as             |                     |
    |--------|----------------------------------|-------------------------|---------------------|
    | "twn"  | abs(W) <= 0.7 of the mean        | the mean of the others  | arXiv 1605.04711    |
    | "tbt"  | below half of the scale          | 4/3 of the mean         | arXiv 2306.01841    |
    | "b158" | below half of the scale          | the mean of the tensor  | arXiv 2402.17764    |

    Args:
        matrix: `(N, K)` floating point.
        group: Columns that share a scale; 0 for all of a row.
        rule: One of the table.
    """

    def __init__(self, matrix: Tensor, group: int = 0, rule: str = "twn") -> None:
        super().__init__(matrix, group)
        if rule not in _RULES:
            raise unknown("rule of ternary", rule, _RULES)
        self.rule = _RULES[rule]
        parts = self.parts(matrix.detach())
        scale = self.rule.scale(parts, self.rule.threshold(parts))
        self.scale = nn.Parameter(scale.clamp_min(1e-12).clone())

    @property
    def spec(self) -> TensorSpec:
        """See `Binarizer.spec`."""
        return self.one_level("ternary")

    def _levels(self, matrix: Tensor) -> Tensor:
        parts = self.parts(matrix)
        threshold = self.rule.threshold(parts.detach())
        return straight_through(parts, torch.sign(parts) * (parts.abs() > threshold))

    def forward(self, matrix: Tensor) -> Tensor:
        """See `Binarizer.forward`."""
        return (self.written(self.scale) * self._levels(matrix)).view(matrix.shape)

    @torch.no_grad()
    def export(self, matrix: Tensor) -> Exported:
        """See `Binarizer.export`."""
        levels = self._levels(matrix) * torch.where(self.scale < 0, -1.0, 1.0)
        codes = self.spec.grid.encode(levels.view(matrix.shape))
        return Exported(codes, self.stored(self.scale), self.spec)
