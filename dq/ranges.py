"""The range of a static input, and how calibration finds it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dq.errors import DQError, inside
from dq.nn.changed import entered
from dq.nn.kept import others
from dq.nn.simulated import segments, sharing
from dq.nn.steps import Steps
from dq.nn.stepwise import spread_rows
from dq.observers import Observer, observers
from dq.plan import LayerSpec
from dq.transform import Transform

__all__ = ["InputObserver", "InputRange", "InputRanges"]


class InputRange(NamedTuple):
    """What calibration has found out about a static input.

    Attributes:
        low: `(S,)` float32, the smallest value of each segment, or group of channels; `(T, S)` for
            T step groups.
        high: Likewise, the largest.
        kept: `(K,)` float32, the token that is computed apart; None if there is none.
    """

    low: Tensor
    high: Tensor
    kept: Tensor | None = None


InputRanges = dict[str, InputRange]  # by layer


class InputObserver:
    """An observer for each segment of a layer's static input, in each step group."""

    steps: Steps | None = None

    def __init__(self, place: str, layer: nn.Module, spec: LayerSpec, transform: Transform) -> None:
        assert isinstance(layer, (nn.Linear, nn.Conv2d))  # plans name no other layers
        assert spec.input is not None  # the caller has filtered
        self.place, self.layer, self.transform = place, layer, transform
        self.spec = spec.input
        self.groups = spec.input.step_groups
        self.every = spec.kept_every
        self.kept: Tensor | None = None
        self.axis = -1 if isinstance(layer, nn.Linear) else 1
        self.sizes = segments(layer, spec)
        made = observers[spec.input.observer]
        self.observers: list[list[Observer]] = [
            [made(spec.input) for _ in self.sizes] for _ in self.groups or (0,)
        ]

    def update(self, x: Tensor) -> None:
        """Take in one input of the layer; kept tokens do not widen its range."""
        x = entered(self.layer, x, self.transform)
        if self.every:
            x = self._without_kept(x)
        for group, mine in self._by_step(x):
            for observer, part in zip(
                self.observers[group], mine.split(self.sizes, self.axis), strict=True
            ):
                rows = sharing(part.float(), self.spec, self.axis)
                if not bool(torch.isfinite(rows.sum())):
                    raise DQError(
                        f"{self.place}: its input is not finite during calibration; "
                        "calibrate in float32 or bfloat16, and check the checkpoint"
                    )
                observer.update(rows)

    def _by_step(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the step groups that some rows of an input belong to, and these rows."""
        if self.steps is None or not self.groups:
            yield 0, x
            return
        index = self.steps.nearest(self.groups)
        if isinstance(index, int):
            yield index, x
            return
        each = spread_rows(index, len(x))
        for group in each.unique().tolist():
            yield group, x[each == group]

    def _without_kept(self, x: Tensor) -> Tensor:
        """Return the other tokens, `(n, K)`; the first kept one that is not zero is noted."""
        tokens = x[..., :: self.every, :].reshape(-1, x.shape[-1])
        tokens = tokens[tokens.any(1)]
        if self.kept is None and len(tokens):
            self.kept = tokens[0].float().clone()
        return others(x, self.every)

    def range(self) -> InputRange:
        """Return what was found."""
        with inside(self.place):
            lows, highs = [], []
            for mine in self.observers:
                low, high = zip(*(observer.range() for observer in mine), strict=True)
                lows.append(torch.cat(low))
                highs.append(torch.cat(high))
            if self.every and self.kept is None:
                raise DQError("every prompt of the calibration was zero; add prompts with text")
        if not self.groups:
            return InputRange(lows[0], highs[0], self.kept)
        return InputRange(torch.stack(lows), torch.stack(highs), self.kept)
