"""Calibration on noise: for denoisers without a pipeline, such as those of benchmarks and tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from dq.calibrate import CalibrationSpec
from dq.family import family_of

__all__ = ["NoiseSource"]


@dataclass(frozen=True)
class NoiseSource:
    """Makes a bare denoiser run on random inputs at spread timesteps; see `dq.calibrate.Source`.

    What it calls is right in shape and dtype and wrong in distribution: ranges that it finds suit
    measurements of speed, or models whose weights are random as well.

    Args:
        model: The denoiser.
    """

    model: nn.Module

    def batches(self, spec: CalibrationSpec) -> int:
        """Return how many batches there are."""
        return -(-spec.n // spec.batch)

    @torch.no_grad()
    def run(self, spec: CalibrationSpec, batch: int) -> None:
        """Call the denoiser once a step."""
        generator = torch.Generator().manual_seed(spec.seed + batch)
        size = min(spec.batch, spec.n - batch * spec.batch)
        for step in range(spec.steps):
            inputs = family_of(self.model).sample_inputs(self.model, size, generator)
            middle = inputs["timestep"]  # samples sit in the middle of the schedule
            spread = middle * ((2 * step + 1) / spec.steps)
            self.model(**{**inputs, "timestep": spread.to(middle.dtype)})
