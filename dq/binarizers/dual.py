"""Two zeros-or-ones with a scale each: flexible dual binarization."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dq.binarizers.binarizer import Binarizer, Exported
from dq.binarizers.registry import binarizers
from dq.quantize import straight_through
from dq.scales import Scales
from dq.spec import TensorSpec

__all__ = ["Dual"]

_TRIED = [factor / 20 for factor in range(12, 33)]  # root mean squares, for the first scale


def _step(x: Tensor) -> Tensor:
    """Return 1 above 0 and 0 below, with the gradient of the identity."""
    return straight_through(x, (x >= 0).to(x.dtype))


@binarizers.register("fdb")
class Dual(Binarizer):
    """W ~ a b + c d with b and d of 0 and 1, a and c learned (DB-LLM, Chen et al. 2024).

    arXiv 2402.11960, section 3.2: b = [W >= (a + c) / 2], d = [W - a b <= c / 2]. It begins with
    a = 2 s and c = -s, hence the levels -s, 0, s, 2 s.

    Args:
        matrix: `(N, K)` floating point.
        group: Columns that share their scales; 0 for all of a row.
    """

    def __init__(self, matrix: Tensor, group: int = 0) -> None:
        super().__init__(matrix, group)
        parts = self.parts(matrix.detach())
        size = parts.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
        tried = torch.stack([size * factor for factor in _TRIED])
        errors = torch.stack([(_sum(parts, 2 * s, -s) - parts).square().sum(-1) for s in tried])
        best = tried.gather(0, errors.argmin(0)[None, ..., None]).squeeze(0)
        self.first = nn.Parameter(2 * best)
        self.second = nn.Parameter(-best)

    @property
    def spec(self) -> TensorSpec:
        """See `Binarizer.spec`."""
        return TensorSpec("binary", self.blocks, symmetric=False, observer="mse", bases=2)

    def forward(self, matrix: Tensor) -> Tensor:
        """See `Binarizer.forward`."""
        return _sum(self.parts(matrix), self.first, self.second).view(matrix.shape)

    @torch.no_grad()
    def export(self, matrix: Tensor) -> Exported:
        """See `Binarizer.export`: zeros and ones are signs with half the scale, and an offset."""
        codes, sizes = torch.zeros(matrix.shape, dtype=torch.uint8, device=matrix.device), []
        for index, (bit, scale) in enumerate(_bits(self.parts(matrix), self.first, self.second)):
            positive = (bit > 0) == (scale >= 0)
            codes |= positive.to(torch.uint8).view(matrix.shape) << index
            sizes.append((scale.abs() / 2).clamp_min(1e-12).squeeze(-1))
        offset = (self.first + self.second).squeeze(-1) / 2
        scales = Scales(sizes[0], -offset / sizes[0], None, sizes[1].unsqueeze(-1))
        return Exported(codes, scales, self.spec)


def _bits(x: Tensor, a: Tensor, c: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return each bit with its scale."""
    b = _step(x - (a + c) / 2)
    return (b, a), (_step(-(x - a * b - c / 2)), c)


def _sum(x: Tensor, a: Tensor, c: Tensor) -> Tensor:
    (b, _), (d, _) = _bits(x, a, c)
    return a * b + c * d
