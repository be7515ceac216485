"""Several signs, each of what those before it have left."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dq.bases import fit_signs, greedy_signs
from dq.binarizers.binarizer import Binarizer, Exported
from dq.binarizers.estimators import ste_sign
from dq.binarizers.registry import binarizers
from dq.scales import Scales
from dq.spec import TensorSpec

__all__ = ["EBB", "LMB", "Residual"]

_WINDOW = 1.0  # of the straight-through gradient, as in BinaryDM; pretrained weights lie within


@binarizers.register("residual")
class Residual(Binarizer):
    """W ~ sum_i s_i sign(R_i) with R_1 = W and R_(i+1) = R_i - s_i sign(R_i), all s_i learned.

    Args:
        matrix: `(N, K)` floating point.
        group: Columns that share their scales; 0 for all of a row.
        bases: How many.
        refit: Whether scales begin as alternating least squares has them, instead of one after the
            other; see `dq.bases`.
    """

    def __init__(self, matrix: Tensor, group: int = 0, bases: int = 2, refit: bool = False) -> None:
        super().__init__(matrix, group)
        parts = self.parts(matrix.detach())
        found = (fit_signs if refit else greedy_signs)(parts, bases)
        more = () if found.more is None else found.more.unbind(-1)
        self.scales = nn.ParameterList(s.unsqueeze(-1).clone() for s in (found.scale, *more))

    @property
    def shares(self) -> tuple[float, ...]:
        """How much each basis counts now; those after the last one not at all."""
        return (1.0,) * len(self.scales)

    @property
    def used(self) -> int:
        """How many of the bases count now."""
        return len(self.shares)

    @property
    def spec(self) -> TensorSpec:
        """See `Binarizer.spec`."""
        return TensorSpec("binary", self.blocks, observer="mse", bases=len(self.scales))

    def _first(self) -> Tensor:
        """Return the scale of the first basis, as it is computed with."""
        return self.scales[0]

    def _terms(self, matrix: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
        """Return scale and signs of the first bases."""
        left, found = self.parts(matrix), []
        for scale in [self._first(), *list(self.scales)[1:]][:count]:
            sign = ste_sign(left, _WINDOW)
            found.append((scale, sign))
            left = left - scale * sign
        return found

    def forward(self, matrix: Tensor) -> Tensor:
        """See `Binarizer.forward`."""
        each = zip(self.shares, self._terms(matrix, self.used), strict=True)
        terms = [share * scale * sign for share, (scale, sign) in each]
        return torch.stack(terms).sum(0).view(matrix.shape)

    @torch.no_grad()
    def export(self, matrix: Tensor) -> Exported:
        """See `Binarizer.export`."""
        codes, sizes = torch.zeros(matrix.shape, dtype=torch.uint8, device=matrix.device), []
        for index, (scale, sign) in enumerate(self._terms(matrix, self.spec.bases)):
            positive = (sign > 0) == (scale >= 0)  # learning may turn a scale
            codes |= positive.to(torch.uint8).view(matrix.shape) << index
            sizes.append(scale.abs().clamp_min(1e-12).squeeze(-1))
        more = torch.stack(sizes[1:], -1) if len(sizes) > 1 else None
        return Exported(codes, Scales(sizes[0], None, None, more), self.spec)


@binarizers.register("lmb")
class LMB(Residual):
    """The learnable multi-basis binarizer: two bases for good (Zheng et al. 2024).

    arXiv 2404.05662, versions 1 to 4: W ~ s_1 sign(W) + s_2 sign(W - s_1 sign(W)), equation 5.
    """

    def __init__(self, matrix: Tensor, group: int = 0, refit: bool = False) -> None:
        super().__init__(matrix, group, 2, refit)


@binarizers.register("ebb")
class EBB(Residual):
    """The evolvable-basis binarizer: two bases at first, one in the end (Zheng et al. 2025).

    arXiv 2404.05662v5, equations 6 to 9. The second scale is pulled to zero by a penalty on its
    magnitude (the paper writes its sum, which would reward negative ones), then left out.

    Args:
        matrix: `(N, K)` floating point.
        group: Columns that share their scales; 0 for all of a row.
        switch: Share of the training after which one basis is left.
        fading: Whether the second basis counts less and less until then, so that nothing jumps when
            it is left out: for trainings too short for the penalty. The paper's counts in full.
    """

    def __init__(
        self, matrix: Tensor, group: int = 0, switch: float = 0.5, fading: bool = False
    ) -> None:
        super().__init__(matrix, group, 2)
        self.switch, self.fading = switch, fading

    @property
    def shares(self) -> tuple[float, ...]:
        """See `Residual.shares`."""
        if self.progress >= self.switch:
            return (1.0,)
        return 1.0, 1 - self.progress / self.switch if self.fading else 1.0

    @property
    def spec(self) -> TensorSpec:
        """See `Binarizer.spec`."""
        return self.one_level("binary")

    def _first(self) -> Tensor:
        return self.written(self.scales[0])

    @torch.no_grad()
    def export(self, matrix: Tensor) -> Exported:
        """See `Binarizer.export`."""
        codes, _, spec = super().export(matrix)
        return Exported(codes, self.stored(self.scales[0]), spec)

    def regularizer(self) -> Tensor:
        """See `Binarizer.regularizer`."""
        return self.scales[1].abs().mean() if self.used == 2 else super().regularizer()
