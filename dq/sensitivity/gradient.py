"""The noise of every format of every layer, from backward passes instead of a run each.

When the output of a layer changes by e, that of the model changes by J e, to first order. For a
random vector v with independent entries of mean zero and variance one, g = J'v is what a backward
pass from v leaves at the layer, and E[(g . e)^2] = |J e|^2. Images of a batch do not see each
other, so that each is a sample of its own. What quantizing a tensor does to its own layer is
computed when the gradient arrives there: one product a format, and nothing is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dq.calls import Call, run
from dq.sensitivity.probe import Noise, Probe
from dq.sensitivity.shares import shared
from dq.taps import hooked
from dq.work import Work

__all__ = ["estimate"]

_POWER = "power"
_KEPT = 1 << 28  # quantized weights at most that are kept, of all layers in all formats: 1 GB


def estimate(probe: Probe, layers: list[str], work: Work, repeats: int = 4) -> dict[str, Noise]:
    """Estimate what `dq.sensitivity.measure` measures, for all formats at once.

    Args:
        probe: What to estimate, and on what.
        layers: Those that run.
        work: Where finished calls are kept.
        repeats: Random vectors for each call. The relative error falls with the root of their
            number times that of images and calls: 256 samples leave 9 %.

    Returns:
        Relative noise power by layer and format.
    """
    one = _Estimate(probe, layers)
    with _without_gradients(probe.model):
        parts = shared(
            work, "estimate", len(probe.calls), lambda i: one.run(i, repeats), "differentiating"
        )
    total = {key: sum(float(part[key]) for part in parts) for key in parts[0]}
    found: dict[str, Noise] = {name: {} for name in layers}
    for name in layers:
        for key in probe.keys(name):
            found[name][key] = total[f"{name}|{key}"] / total[_POWER]
    return found


class _Estimate:
    """Adds up the squares of gradient times change."""

    def __init__(self, probe: Probe, layers: list[str]) -> None:
        self.probe = probe
        self.layers = layers
        self.sums: dict[str, float] = {}
        weights = sum(probe.layer(n).weight.numel() * len(probe.keys(n)) for n in layers)
        self._keeps = weights <= _KEPT
        self._variants: dict[tuple[str, str], nn.Module] = {}

    def run(self, index: int, repeats: int) -> dict[str, Tensor]:
        """Run one call forward and backward, some times."""
        self.sums = {f"{n}|{key}": 0.0 for n in self.layers for key in self.probe.keys(n)}
        self.sums[_POWER] = 0.0
        generator = torch.Generator().manual_seed(index)
        for _ in range(repeats):
            self._add(self.probe.calls[index], generator)
        return {key: torch.tensor(value, dtype=torch.float64) for key, value in self.sums.items()}

    def _add(self, call: Call, generator: torch.Generator) -> None:
        with self._listening(), torch.enable_grad():
            y = run(self.probe.model, call)
            v = torch.randn(y.shape, generator=generator).to(y)
            (y * v).sum().backward()
        self.sums[_POWER] += float(y.detach().double().square().sum())

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """While active, meet the gradient at each layer's output with its possible changes."""

        def hook(name: str, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            if not y.requires_grad:  # nothing before it does, no parameter does
                y.requires_grad_()
            y.register_hook(partial(self._meet, name, args[0].detach(), y.detach()))

        layers = {name: self.probe.layer(name) for name in self.layers}
        with hooked([m.register_forward_hook(partial(hook, n)) for n, m in layers.items()]):
            yield

    @torch.no_grad()
    def _meet(self, name: str, x: Tensor, y: Tensor, gradient: Tensor) -> None:
        for key in self.probe.keys(name):
            change = self._variant(name, key)(x) - y
            samples = (change * gradient).flatten(1).sum(1, dtype=torch.float64)
            self.sums[f"{name}|{key}"] += float(samples.square().sum())

    def _variant(self, name: str, key: str) -> nn.Module:
        """Return a layer with one tensor quantized, kept only for models that are small."""
        found = self._variants.get((name, key))
        if found is None:
            found = self.probe.variant(name, key)
            if self._keeps:
                self._variants[name, key] = found
        return found


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """While active, no parameter takes a gradient: only outputs of layers do."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)
