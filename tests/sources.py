"""Things that make a denoiser run, for tests of calibration."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from dq.calibrate import CalibrationSpec
from dq.calls import run
from dq.family import family_of
from tests.models import ModelCase

__all__ = ["Drawing", "Samples"]


class Samples:
    """Feeds the family's sample inputs; dies once at a batch if told so.

    Attributes:
        runs: Batches that were asked for, in order, those that died included.
    """

    def __init__(self, model: nn.Module, count: int = 3, dies_at: int | None = None) -> None:
        self.model = model
        self.count = count
        self.dies_at = dies_at
        self.runs: list[int] = []

    def batches(self, spec: CalibrationSpec) -> int:
        return self.count

    def images(self, spec: CalibrationSpec, batch: int) -> torch.Tensor:
        raise NotImplementedError

    def held_out(self, spec: CalibrationSpec, n: int) -> CalibrationSpec:
        return dataclasses.replace(spec, seed=spec.seed + 1000)

    def identity(self, spec: CalibrationSpec) -> dict[str, Any]:
        return {"count": self.count}

    @torch.no_grad()
    def run(self, spec: CalibrationSpec, batch: int) -> torch.Tensor:
        self.runs.append(batch)
        for call in range(2):
            if batch == self.dies_at and call == 1:
                self.dies_at = None
                raise KeyboardInterrupt("killed")
            generator = torch.Generator().manual_seed(spec.seed + 10 * batch + call)
            inputs = family_of(self.model).sample_inputs(self.model, 2, generator)
            output = run(self.model, inputs)
        return output


class Drawing:
    """Draws images with a tiny pipeline, and keeps what its denoiser returned.

    Attributes:
        outputs: First output of each call of the denoiser.
    """

    def __init__(self, case: ModelCase, pipe: Any) -> None:
        self.case = case
        self.pipe = pipe
        self.outputs: list[torch.Tensor] = []

    def batches(self, spec: CalibrationSpec) -> int:
        return 2

    def images(self, spec: CalibrationSpec, batch: int) -> torch.Tensor:
        raise NotImplementedError

    def held_out(self, spec: CalibrationSpec, n: int) -> CalibrationSpec:
        return spec

    def identity(self, spec: CalibrationSpec) -> dict[str, Any]:
        return {}

    def run(self, spec: CalibrationSpec, batch: int) -> torch.Tensor:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
            self.outputs.append(first.detach().clone())

        handle = self.case.network(self.pipe).register_forward_hook(hook)
        try:
            return torch.from_numpy(self.case.call(self.pipe, seed=batch))
        finally:
            handle.remove()
