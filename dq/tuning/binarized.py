"""A layer whose weight learns to be of few bits: what stands in it meanwhile, and what is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dq.binarizers import Binarizer
from dq.nn import Quantizer
from dq.nn.latent import FullWeight
from dq.nn.split import SplitQuantizer, joined
from dq.tuning.loop import Group

__all__ = ["Binarized"]


class Binarized:
    """Makes weight and bias of a simulated layer learnable, under a binarizer.

    Args:
        layer: Simulated; its salient channels, if it has some, keep the quantizer that they have.
        make: Makes the binarizer of a weight `(N, K)`.
    """

    def __init__(self, layer: Any, make: Callable[[Tensor], Binarizer]) -> None:
        self.layer = layer
        matrix = layer.matrix().detach().float()
        layer.codes = None  # of an earlier step, which would be computed with instead
        layer.latent = FullWeight(matrix)
        bias = layer.changed_bias()
        if bias is not None:
            layer.latent_bias = nn.Parameter(bias.detach().float().clone())
        split = layer.weight_quantizer
        self._split = split if isinstance(split, SplitQuantizer) else None
        self.binarizer = make(self._rest(matrix)).to(matrix.device)
        self._stands: nn.Module = self.binarizer
        if self._split is not None:
            self._stands = SplitQuantizer(self.binarizer, self._split.dense, self._split.mask)
        layer.binarizer = self._stands

    def _rest(self, matrix: Tensor) -> Tensor:
        """Return the columns that are binarized."""
        return matrix if self._split is None else matrix[:, ~self._split.mask]

    def groups(self, rate: float, scale_rate: float) -> list[Group]:
        """Return what learns.

        Args:
            rate: Learning rate of weight and bias, in mean magnitudes of the weight.
            scale_rate: Of the binarizer's scales, likewise.
        """
        size = float(self.layer.latent.value.detach().abs().mean())
        bias = self.layer.latent_bias
        weights = [*self.layer.latent.parameters(), *([] if bias is None else [bias])]
        scales = [*self.binarizer.parameters()]
        groups = [Group(weights, rate * size)]
        return [*groups, Group(scales, scale_rate * size)] if scales else groups

    def at(self, progress: float, started: bool = True) -> None:
        """Say how far training is, 0 to 1, and whether the layer computes with few bits yet."""
        self.binarizer.at(progress)
        self.layer.binarizer = self._stands if started else nn.Identity()

    def end(self) -> None:
        """Put what is stored in the place of what has learned."""
        layer, matrix = self.layer, self.layer.latent().detach()
        codes, scales, spec = self.binarizer.export(self._rest(matrix))
        assert spec == layer.spec.weight  # as it was decided
        quantizer = Quantizer(spec)
        quantizer.set_scales(scales)
        layer.codes, layer.weight_quantizer, layer.binarizer = codes, quantizer, None
        if self._split is not None:
            dense, mask = self._split.dense, self._split.mask
            layer.codes = joined(codes, dense.encode(matrix[:, mask]), mask)
            layer.weight_quantizer = SplitQuantizer(quantizer, dense, mask)
