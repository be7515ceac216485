"""Calibration on noise: for denoisers without a pipeline, such as those of benchmarks and tests."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dq.calibrate import CalibrationSpec
from dq.calls import run
from dq.errors import DQError
from dq.family import family_of

__all__ = ["NoiseSource"]


@dataclass(frozen=True)
class NoiseSource:
    """Makes a bare denoiser run on random inputs at spread timesteps; see `dq.calibrate.Source`.

    Models without a timestep, which predict tokens, run on other random inputs in each step.

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
    def run(self, spec: CalibrationSpec, batch: int) -> Tensor:
        """Call the denoiser once a step, and return what it said last."""
        generator = torch.Generator().manual_seed(spec.seed + batch)
        size = min(spec.batch, spec.n - batch * spec.batch)
        for step in range(spec.steps):
            inputs = family_of(self.model).sample_inputs(self.model, size, generator)
            if "timestep" in inputs:
                middle = inputs["timestep"]  # samples sit in the middle of the schedule
                spread = middle * ((2 * step + 1) / spec.steps)
                inputs["timestep"] = spread.to(middle.dtype)
            output = run(self.model, inputs)
        return output.float().cpu()

    def images(self, spec: CalibrationSpec, batch: int) -> Tensor:
        """Noise has no images."""
        raise DQError("a denoiser without a pipeline draws no images; use a pipeline, or no SSIM")

    def held_out(self, spec: CalibrationSpec, n: int) -> CalibrationSpec:
        """Return other seeds."""
        return dataclasses.replace(spec, n=n, seed=spec.held_out_seed)

    def identity(self, spec: CalibrationSpec) -> dict[str, Any]:
        """Return the settings: there is nothing else."""
        return {"noise": dataclasses.asdict(spec)}
