"""Probes of tiny models, for tests of sensitivity."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dq.calibrate import Calibration, CalibrationSpec
from dq.calls import run
from dq.family import family_of
from dq.sensitivity.candidates import Candidates
from dq.sensitivity.probe import Probe
from dq.sensitivity.survey import Settings, prepare
from dq.work import Work
from tests.models import MODELS
from tests.sources import Samples

__all__ = ["calibration", "network", "probe"]

WEIGHTS = ("int2", "int4", "int8")


def network(name: str) -> nn.Module:
    return MODELS[name].network(MODELS[name].build()).eval()


def calibration(model: nn.Module, batches: int = 1) -> Calibration:
    return Calibration(model, Samples(model, batches), CalibrationSpec(), Work(None))


def probe(model: nn.Module, inputs: tuple[str, ...] = ("int8",), **settings: Any) -> Probe:
    """A probe of two calls of two images."""
    family = family_of(model)
    candidates = Candidates.of(model, family, WEIGHTS, inputs, family.dynamic_inputs)
    wanted = Settings(**{"steps": 2, **settings})
    return prepare(calibration(model), candidates, wanted)


@torch.no_grad()
def outputs(one: Probe) -> list[torch.Tensor]:
    return [run(one.model, call) for call in one.calls]
