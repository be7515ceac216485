"""What a step of a recipe is, and what it is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from dq.calibrate import Calibration
from dq.family import Family
from dq.plan import Plan
from dq.ranges import InputRange
from dq.registry import Registry
from dq.spec import TensorSpec
from dq.tokens.choice import Chosen
from dq.transform import Transform

__all__ = ["ChosenRange", "Job", "Method", "methods"]


class ChosenRange(NamedTuple):
    """The range of a static input that a step has chosen, and the format that it is for."""

    spec: TensorSpec
    range: InputRange


@dataclass
class Job:
    """The only carrier that methods are given.

    Attributes:
        model: The denoiser; float before `install`, simulated after.
        family: What is known about it.
        plan: The decisions so far.
        calibration: Captured calls, made on first use.
        transforms: Of the inputs of layers whose spec has one, by layer.
        tokens: Orders and block masks, by attention whose spec has ordered tokens.
        ranges: Of static inputs, by layer, where a step has chosen them; others are calibrated.
        generator: Source of every random number that a method draws.
    """

    model: nn.Module
    family: Family
    plan: Plan
    calibration: Calibration
    transforms: dict[str, Transform] = field(default_factory=dict)
    tokens: dict[str, Chosen] = field(default_factory=dict)
    ranges: dict[str, ChosenRange] = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Method:
    """One step of a recipe. A subclass is a frozen dataclass of its hyper-parameters.

    It overrides the hooks that it needs.
    """

    def observe(self, job: Job) -> None:
        """Measure what `decide` will ask for; results are kept in `job.calibration.work`."""

    def decide(self, job: Job) -> Plan:
        """Return the plan that `job.plan` becomes. The model may lie on the meta device."""
        return job.plan

    def tune(self, job: Job) -> None:
        """Change weights and scales of the simulated layers, in place."""


methods: Registry[type[Method]] = Registry("method", home="dq.methods")
