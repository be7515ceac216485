"""How far a plan is from full precision, on prompts that nothing was fitted to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dq.calibrate import CalibrationSpec, Source
from dq.calls import Call, run
from dq.distance import sqnr
from dq.nn import QuantLayer, install, uninstall
from dq.presets import FLOAT
from dq.progress import track
from dq.sensitivity.probe import Probe

__all__ = ["drawn", "output_noise", "quality", "simulated"]


@contextmanager
def simulated(probe: Probe, choice: Mapping[str, tuple[str, str]]) -> Iterator[None]:
    """While active, the probe's model simulates a choice of (weight, input) by layer."""
    scales = {n: probe.scales(n, weight) for n, (weight, _) in choice.items() if weight != FLOAT}
    plan = probe.candidates.plan(choice)
    install(probe.model, plan, scales)
    try:
        for name, spec in plan.layers.items():
            if spec.is_static:
                layer = probe.model.get_submodule(name)
                assert isinstance(layer, QuantLayer)  # the plan names it
                layer.set_input(*probe.ranges[choice[name][1]][name])
        yield
    finally:
        uninstall(probe.model)


def drawn(source: Source, spec: CalibrationSpec, title: str) -> Tensor:
    """Draw all images of a specification, `(N, ...)`."""
    batches = track(range(source.batches(spec)), title)
    return torch.cat([source.run(spec, batch) for batch in batches])


def quality(images: Tensor, reference: Tensor) -> float:
    """Return the mean signal to noise ratio of images, in dB."""
    ratios = [sqnr(x, y) for x, y in zip(images, reference, strict=True)]
    return sum(ratios) / len(ratios)


@torch.no_grad()
def output_noise(model: nn.Module, calls: Sequence[Call], references: Sequence[Tensor]) -> float:
    """Return the relative noise power of the outputs of some calls.

    Args:
        model: The denoiser, simulating a plan.
        calls: Arguments of forward calls.
        references: Full precision's outputs of the same calls.
    """
    noise = power = 0.0
    for call, reference in zip(calls, references, strict=True):
        y = run(model, call)
        noise += float((y - reference).double().square().sum())
        power += float(reference.double().square().sum())
    return noise / power
