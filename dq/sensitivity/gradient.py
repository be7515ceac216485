"""The same table without a run a layer: from one backward pass for each call.

The output y of the model changes by J e when a tensor changes by e. For a random vector v with
independent entries of variance one, g = J'v has E[g_i^2] = the squared norm of column i of J, so
that the sum of g_i^2 e_i^2 estimates |J e|^2 where the entries of e are independent of each other,
as rounding errors nearly are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dq.calibrate import Call
from dq.progress import track
from dq.sensitivity.probe import Probe, as_float32, tabulate
from dq.sensitivity.table import Table
from dq.sensitivity.trace import trace
from dq.sensitivity.variants import input_error

__all__ = ["estimate"]


def estimate(probe: Probe, seed: int = 0) -> Table:
    """Estimate the table that `dq.sensitivity.measure` measures, for all formats at once.

    Args:
        probe: What to estimate, and on what.
        seed: Of the random vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    with as_float32(probe.model):
        seen = trace(probe.model, probe.calls[0])
        names = [name for name in seen.order if name in probe.candidates.shapes]
        one = _Estimate(probe, names)
        with _only_wanted(probe.model, [probe.layer(n).weight for n in names]):
            for call in track(probe.calls, "differentiating"):
                one.add(call, generator)
    found = {name: (one.relative(name), one.errors[name]) for name in names}
    return tabulate(probe, seen, found, "estimated from gradients")


class _Estimate:
    """Adds up squared gradients times squared errors, call by call."""

    def __init__(self, probe: Probe, names: list[str]) -> None:
        self.probe = probe
        self.noise: dict[str, dict[str, float]] = {}
        self.errors: dict[str, dict[str, float]] = {}
        self.changes = {name: self._changes(name) for name in names}
        self.inputs = {
            name: {input: probe.input_alone(name, input) for input in probe.candidates.inputs}
            for name in names
        }
        self.power = 0.0

    def _changes(self, name: str) -> dict[str, Tensor]:
        """Return by how much each format changes the weight, squared."""
        changes = {}
        with torch.no_grad():
            for weight in self.probe.candidates.weights[name]:
                made = self.probe.weight_alone(name, weight)
                matrix = self.probe.layer(name).weight.flatten(1)
                changes[weight] = (made.weight_quantizer(matrix) - matrix).square_()
        weights = (f"w:{key}" for key in changes)
        inputs = (f"a:{key}" for key in self.probe.candidates.inputs)
        self.noise[name] = dict.fromkeys((*weights, *inputs), 0.0)
        self.errors[name] = dict(self.noise[name])  # every format is estimated: none is filled in
        return changes

    def add(self, call: Call, generator: torch.Generator) -> None:
        """Run one call forward and backward."""
        with self._listening(), torch.enable_grad():
            y = self.probe.model(**call, return_dict=False)[0]
            v = torch.randn(y.shape, generator=generator).to(y)
            (y * v).sum().backward()
        self.power += float(y.detach().double().square().sum())
        for name, changes in self.changes.items():
            weight = self.probe.layer(name).weight
            if weight.grad is None:  # it runs, and nothing of it reaches the output
                continue
            squares = weight.grad.flatten(1).square()
            for key, change in changes.items():
                self.noise[name][f"w:{key}"] += float((squares * change).sum(dtype=torch.float64))
            weight.grad = None

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """While active, meet the gradient of each layer's input with its quantization errors."""

        def meet(name: str, errors: dict[str, Tensor], gradient: Tensor) -> None:
            squares = gradient.square()
            for key, error in errors.items():
                self.noise[name][f"a:{key}"] += float((squares * error).sum(dtype=torch.float64))

        def hook(name: str, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            with torch.no_grad():
                errors = {
                    k: input_error(m, args[0]).square_() for k, m in self.inputs[name].items()
                }
            # A view: the gradient of what this layer does with it, not of what others do.
            x = args[0].view_as(args[0]) if args[0].requires_grad else args[0].detach().clone()
            x.requires_grad_()
            x.register_hook(partial(meet, name, errors))
            return (x, *args[1:])

        handles = [
            self.probe.layer(name).register_forward_pre_hook(partial(hook, name))
            for name in self.changes
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def relative(self, name: str) -> dict[str, float]:
        """Return the noise of all formats."""
        return {key: value / self.power for key, value in self.noise[name].items()}


@contextmanager
def _only_wanted(model: nn.Module, wanted: list[Tensor]) -> Iterator[None]:
    """While active, gradients are kept for some parameters only."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.grad = None
            parameter.requires_grad_(False)
        for weight in wanted:
            weight.requires_grad_()
        yield
    finally:
        for parameter, needed, gradient in before:
            parameter.grad = gradient
            parameter.requires_grad_(needed)
