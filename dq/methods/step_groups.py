"""Scales of static inputs for groups of denoising steps.

What enters a layer drifts while noise becomes an image; one range for all steps is wide for each
of them. QuEST's public code has scales for every calibration step (Wang et al. 2024, arXiv
2402.03666), found by a counter of the sampler; here a call takes those of the nearest timestep, so
that other schedules and numbers of steps work too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from dq.calibrate import Calibration
from dq.errors import DQError
from dq.family import Role
from dq.method import Job, Method, methods
from dq.nn.steps import ARGUMENT, by_row, noted
from dq.plan import LayerSpec, Plan

__all__ = ["StepGroups", "captured_times", "centres"]

_TIMELESS = (Role.CAPTION, Role.CROSS_KV)  # see the prompt, which is the same at every step


def captured_times(model: nn.Module, calibration: Calibration) -> tuple[float, ...]:
    """Return the timesteps of the captured calls, all different, ascending.

    Raises:
        DQError: If the denoiser is not told the timestep.
        NeedsData: If nothing makes it run.
    """
    with noted(model):  # says it if there is none
        pass
    times: set[float] = set()
    for calls in calibration.batches():
        for call in calls:
            times |= set(by_row(call[ARGUMENT]).tolist())
    return tuple(sorted(times))


def centres(times: Iterable[float], groups: int) -> tuple[float, ...]:
    """Return the mean timesteps of groups of neighbours that are equally large, or nearly so.

    Args:
        times: Ascending.
        groups: How many.

    Raises:
        DQError: If there are fewer timesteps.
    """
    known = list(times)
    if len(known) < groups:
        raise DQError(
            f"{groups} step groups need as many timesteps, the calibration has {len(known)}; "
            "give it more steps, or ask for fewer groups"
        )
    parts = torch.tensor(known, dtype=torch.float64).tensor_split(groups)
    return tuple(float(part.mean()) for part in parts)


@methods.register("step-groups")
@dataclass(frozen=True)
class StepGroups(Method):
    """Give static inputs scales for groups of steps; comes after the step that decides formats.

    Args:
        groups: How many.
    """

    groups: int = 4

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise DQError(f"groups is 1 or more, not {self.groups}")

    def decide(self, job: Job) -> Plan:
        """Mark the static inputs; see `Method.decide`.

        Raises:
            DQError: If there are none, or the denoiser is not told the timestep.
            NeedsData: If nothing makes the denoiser run.
        """
        if not job.plan.is_static():
            raise DQError("step-groups: no input has static scales; scales found at run time fit")
        found = centres(captured_times(job.model, job.calibration), self.groups)
        roles = job.family.roles(job.model)
        layers = {
            name: spec if roles[name] in _TIMELESS else _grouped(spec, found)
            for name, spec in job.plan.layers.items()
        }
        return dataclasses.replace(job.plan, layers=layers)


def _grouped(spec: LayerSpec, found: tuple[float, ...]) -> LayerSpec:
    if spec.input is None or not spec.is_static:
        return spec
    return dataclasses.replace(spec, input=dataclasses.replace(spec.input, step_groups=found))
