"""One sign and one scale: XNOR-Net's binary weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dq.bases import greedy_signs
from dq.binarizers.binarizer import Binarizer, Exported
from dq.binarizers.estimators import estimators
from dq.binarizers.registry import binarizers
from dq.quantize import straight_through
from dq.scales import Scales
from dq.spec import TensorSpec

__all__ = ["XNOR"]


@binarizers.register("xnor")
class XNOR(Binarizer):
    """W ~ s sign(W), s learned (Rastegari et al. 2016, arXiv 1603.05279, section 3.1).

    Args:
        matrix: `(N, K)` floating point; s begins as the mean of its magnitudes, the least squares.
        group: Columns that share a scale; 0 for all of a row.
        estimator: Of the gradient of the sign; see `dq.binarizers.estimators`.
        centred: Whether the mean of a block is taken out first, and stored with it.
    """

    centre: Tensor | None

    def __init__(
        self, matrix: Tensor, group: int = 0, estimator: str = "ste", centred: bool = False
    ) -> None:
        super().__init__(matrix, group)
        parts = self.parts(matrix.detach())
        found = greedy_signs(parts, 1, centred)
        self.scale = nn.Parameter(found.scale.unsqueeze(-1))
        self.sign = estimators[estimator]
        centre = parts.mean(-1, keepdim=True) if centred else None
        self.register_buffer("centre", centre)
        left = parts if centre is None else parts - centre
        self.register_buffer("unit", left.std(-1, keepdim=True, correction=0).clamp_min(1e-12))
        self.unit: Tensor

    @property
    def spec(self) -> TensorSpec:
        """See `Binarizer.spec`."""
        if self.centre is None:
            return self.one_level("binary")
        return TensorSpec("binary", self.blocks, symmetric=False, observer="mse")

    def _signs(self, parts: Tensor) -> Tensor:
        left = parts if self.centre is None else parts - self.centre
        # Normalized on the way forward alone: what comes back is meant for the weight itself.
        return self.sign(straight_through(left, left / self.unit), self.progress)

    def forward(self, matrix: Tensor) -> Tensor:
        """See `Binarizer.forward`."""
        sign = self._signs(self.parts(matrix))
        if self.centre is None:
            return (self.written(self.scale) * sign).view(matrix.shape)
        return (self.scale * sign + self.centre).view(matrix.shape)

    @torch.no_grad()
    def export(self, matrix: Tensor) -> Exported:
        """See `Binarizer.export`."""
        scale, positive = self.scale, self._signs(self.parts(matrix)) >= 0
        positive = positive == (scale >= 0)  # of a negative scale, which learning may come to
        codes = positive.to(torch.uint8).view(matrix.shape)
        if self.centre is None:
            return Exported(codes, self.stored(scale), self.spec)
        size = scale.abs().clamp_min(1e-12).squeeze(-1)
        return Exported(codes, Scales(size, -self.centre.squeeze(-1) / size), self.spec)
