"""Observers: what range of values a tensor is quantized for.

An observer sees one or many tensors, each reshaped to `(P, M)`: P scales are to be chosen, M
elements share each. It keeps statistics only, never the tensors.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dq.errors import DQError
from dq.registry import Registry
from dq.scales import scales_of_range
from dq.spec import TensorSpec

__all__ = ["MSE", "AbsMax", "Observer", "Percentile", "check_finite", "observers"]


class Observer(Protocol):
    """Accumulates statistics of tensors, then names a range for each scale."""

    def __init__(self, spec: TensorSpec) -> None: ...

    def update(self, x: Tensor) -> None:
        """Take in a `(P, M)` float32 tensor; P must be the same at every call."""

    def range(self) -> tuple[Tensor, Tensor]:
        """Return the smallest and largest value to represent, `(P,)` float32 each.

        Raises:
            DQError: If nothing was seen, or something that is not finite.
        """


observers: Registry[type[Observer]] = Registry("observer")


def check_finite(x: Tensor) -> None:
    """Refuse values that no range holds; compiled code, which cannot look, passes them on.

    Raises:
        DQError: If there is one.
    """
    if not torch.compiler.is_compiling() and not bool(x.isfinite().all()):
        raise DQError("the tensor holds values that are not finite; repair the model or its inputs")


@observers.register("absmax")
class AbsMax:
    """The exact smallest and largest value seen."""

    def __init__(self, spec: TensorSpec) -> None:
        self.spec = spec
        self._low: Tensor | None = None
        self._high: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """See `Observer.update`."""
        low, high = torch.aminmax(x, dim=1)
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)

    def range(self) -> tuple[Tensor, Tensor]:
        """See `Observer.range`."""
        if self._low is None or self._high is None:
            raise DQError("no data was observed; run calibration on inputs that reach this layer")
        # Here, where everything has been seen: a range that cuts off the ends would cut off NaN.
        check_finite(torch.stack([self._low, self._high]))  # a card waits at each look
        return self._low, self._high


class _Sampled(AbsMax):
    """Beside the extremes, keeps an evenly strided sample of each tensor.

    The stride depends on the shape alone: equal data gives equal ranges, bit for bit.
    """

    per_update = 4096  # elements kept of each tensor; 100 calls then sort or search 0.4 M values

    def __init__(self, spec: TensorSpec) -> None:
        super().__init__(spec)
        self._sample: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        """See `Observer.update`."""
        super().update(x)
        # An odd stride does not fall into step with power-of-two rows and channels.
        stride = x.numel() // self.per_update | 1 if x.shape[0] == 1 else 1
        self._sample.append(x[:, ::stride].clone())

    def sample(self) -> Tensor:
        """Return what was kept, `(P, S)`."""
        return torch.cat(self._sample, dim=1)


@observers.register("percentile")
class Percentile(_Sampled):
    """Cuts 0.01 % of the values off each end."""

    share = 1e-4

    def range(self) -> tuple[Tensor, Tensor]:
        """See `Observer.range`."""
        super().range()
        ordered = self.sample().sort(dim=1).values
        cut = int(ordered.shape[1] * self.share)
        return ordered[:, cut], ordered[:, ordered.shape[1] - 1 - cut]


@observers.register("mse")
class MSE(_Sampled):
    """Shrinks the range until the mean squared quantization error is smallest.

    Shrink factors from 1.0 down to 0.22 are tried on the sample. A narrower range saturates a few
    outliers and gives everything else a finer step (Banner et al. 2019, arXiv 1810.05723).
    """

    shrinks = tuple(1.0 - 0.02 * index for index in range(40))

    def range(self) -> tuple[Tensor, Tensor]:
        """See `Observer.range`."""
        low, high = super().range()
        x = self.sample()
        best_error, best = torch.full_like(low, torch.inf), torch.ones_like(low)
        for shrink in self.shrinks:
            scale, zero, *_ = scales_of_range(low * shrink, high * shrink, self.spec)
            levels = x / scale[:, None]
            if zero is None:
                rounded = self.spec.grid.round(levels)
            else:
                rounded = self.spec.grid.round(levels + zero[:, None]) - zero[:, None]
            error = (rounded - levels).square_().mean(dim=1) * scale.square()
            best = torch.where(error < best_error, shrink, best)
            best_error = torch.minimum(error, best_error)
        return low * best, high * best
