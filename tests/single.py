"""A denoiser of one layer, and inputs for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dq.calibrate import Calibration, CalibrationSpec

__all__ = ["One", "calibration_of"]


class One(nn.Module):
    """Calls its layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (self.layer(x),)


class _Given:
    """Makes a denoiser run on given inputs, one a batch."""

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor]) -> None:
        self.model = model
        self.inputs = inputs

    def batches(self, spec: CalibrationSpec) -> int:
        return len(self.inputs)

    @torch.no_grad()
    def run(self, spec: CalibrationSpec, batch: int) -> Tensor:
        y: Tensor = self.model(self.inputs[batch])[0]
        return y

    def images(self, spec: CalibrationSpec, batch: int) -> Tensor:
        raise NotImplementedError

    def held_out(self, spec: CalibrationSpec, n: int) -> CalibrationSpec:
        raise NotImplementedError

    def identity(self, spec: CalibrationSpec) -> dict[str, int]:
        return {}


def calibration_of(model: nn.Module, inputs: Sequence[Tensor]) -> Calibration:
    """Return a calibration that calls `model` once with each input."""
    return Calibration(
        model, _Given(model, inputs), CalibrationSpec(n=len(inputs), steps=1, batch=1)
    )
