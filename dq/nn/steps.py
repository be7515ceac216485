"""The timestep that a denoiser is called with, for layers whose numbers depend on it.

It is read from the call itself, never counted: samplers skip steps, repeat them, or start late.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dq.errors import DQError

__all__ = ["ARGUMENT", "Match", "Steps", "by_row", "noted", "watch"]

ARGUMENT = "timestep"  # as all denoisers of diffusers call it; flow-matching models give sigma here


class Match(NamedTuple):
    """Where the timesteps of a call stand in a list of them.

    Attributes:
        row: `(B,)` int64, the place, or `(1,)` for all; anything where there is none.
        hit: Likewise bool, whether there is one.
        whole: Whether all rows hit, or none; None if some do, or in a graph that is being traced.
    """

    row: Tensor
    hit: Tensor
    whole: bool | None


class Steps:
    """What the denoiser's call says about the step; a pre-hook of it notes that.

    An object, not a closure: copies of a model then have one of their own.

    Args:
        model: The denoiser.

    Raises:
        DQError: If it takes no timestep.
    """

    def __init__(self, model: nn.Module) -> None:
        names = list(inspect.signature(type(model).forward).parameters)
        if ARGUMENT not in names:
            raise DQError(
                f"{type(model).__name__} is not told the timestep, so that nothing in it can "
                "depend on it; leave step groups, cached layers of time and corrections out"
            )
        self._place = names.index(ARGUMENT) - 1  # without self
        self._now: Tensor | None = None
        self._nearest: dict[tuple[float, ...], int | Tensor] = {}
        self._exact: dict[tuple[float, ...], Match] = {}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the timestep of a call; what pre-hooks are called with."""
        value = kwargs[ARGUMENT] if ARGUMENT in kwargs else args[self._place]
        now = by_row(value)
        # Asking for values would break a graph; there, every row is looked up for itself.
        same = len(now) > 1 and not torch.compiler.is_compiling() and bool((now == now[0]).all())
        self._now = now[:1] if same else now
        self._nearest, self._exact = {}, {}

    @contextmanager
    def at(self, timestep: Tensor) -> Iterator[None]:
        """While active, the step is the one of an earlier call, as `now` has returned it."""
        before = self._now, self._nearest, self._exact
        self._now, self._nearest, self._exact = timestep, {}, {}
        try:
            yield
        finally:
            self._now, self._nearest, self._exact = before

    def now(self) -> Tensor:
        """Return the timesteps, `(B,)` float32, or `(1,)` if that of all rows is the same.

        Raises:
            DQError: If the denoiser has not been called: its layers were, by themselves.
        """
        if self._now is None:
            raise DQError("this layer depends on the timestep: call it through its denoiser")
        return self._now

    def nearest(self, centres: tuple[float, ...]) -> int | Tensor:
        """Return which of some timesteps is nearest.

        Args:
            centres: Ascending. Of two that are equally near, the earlier one is taken.

        Returns:
            The index for all rows; or `(B,)` int64 where they differ, and, `(1,)` or `(B,)`, in a
            graph that is being traced.
        """
        if torch.compiler.is_compiling():
            return self._index(centres)
        if centres not in self._nearest:
            found = self._index(centres)
            first = int(found[0])
            self._nearest[centres] = first if bool((found == first).all()) else found
        return self._nearest[centres]

    def _index(self, centres: tuple[float, ...]) -> Tensor:
        now = self.now()
        return (now[:, None] - now.new_tensor(centres)).abs().argmin(1)

    def exactly(self, times: tuple[float, ...]) -> Match:
        """Return which of some timesteps the call is at, if any.

        Args:
            times: All different.
        """
        if torch.compiler.is_compiling():
            return self._match(times)
        if times not in self._exact:
            found = self._match(times)
            hits = found.hit.tolist()
            whole = hits[0] if len(set(hits)) == 1 else None
            self._exact[times] = found._replace(whole=whole)
        return self._exact[times]

    def _match(self, times: tuple[float, ...]) -> Match:
        now = self.now()
        equal = now[:, None] == now.new_tensor(times)
        return Match(equal.int().argmax(1), equal.any(1), None)


def by_row(timestep: Tensor | float) -> Tensor:
    """Return the timestep of each row of a call, `(B,)` float32, or `(1,)` for all of them.

    Args:
        timestep: A number, `(B,)`, or `(B, tokens)`: tokens that are not noise, such as those of a
            picture that a video begins with, have smaller ones than their row.
    """
    value = torch.as_tensor(timestep).detach().float()
    return value.flatten(1).amax(1) if value.dim() > 1 else value.reshape(-1)


@contextmanager
def noted(model: nn.Module) -> Iterator[Steps]:
    """While active, the timestep of each call of a denoiser is noted."""
    steps = Steps(model)
    with model.register_forward_pre_hook(steps, with_kwargs=True):
        yield steps


def watch(model: Any) -> None:
    """Tell the layers of a denoiser that depend on the timestep where to find it, in place."""
    if hasattr(model, "_dq_steps"):
        model._dq_steps.remove()
        del model._dq_steps
    waiting = [m for m in model.modules() if getattr(m, "depends_on_step", False)]
    if waiting:
        steps = Steps(model)
        model._dq_steps = model.register_forward_pre_hook(steps, with_kwargs=True)
        for layer in waiting:
            layer.steps = steps
