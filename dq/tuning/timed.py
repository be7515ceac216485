"""Outputs of layers that see nothing but the timestep, in full precision, for a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from dq.calls import Call, run
from dq.full_precision import full_precision
from dq.nn.steps import ARGUMENT
from dq.taps import tap_outputs

__all__ = ["outputs_over_time"]


@torch.no_grad()
def outputs_over_time(
    model: nn.Module, layers: Iterable[str], times: Sequence[float], calls: Iterable[Call]
) -> dict[str, Tensor]:
    """Return what some layers put out at each of some timesteps, `(T, N)` float32 by name.

    Args:
        model: With simulated layers or float ones; runs in full precision.
        layers: Names of layers that see nothing but the timestep.
        times: T timesteps.
        calls: At least one at each of them; rows of a call are at the same one.
    """
    seen: dict[str, dict[float, Tensor]] = {name: {} for name in layers}
    now = 0.0

    def note(name: str, output: Tensor) -> None:
        seen[name][now] = output[0].float()

    missing = set(times)
    with full_precision(model):
        modules = {name: model.get_submodule(name) for name in seen}
        with tap_outputs(modules, note):
            for call in calls:
                now = float(torch.as_tensor(call[ARGUMENT]).reshape(-1)[0])
                if now in missing:
                    run(model, call)
                    missing.remove(now)
    return {name: torch.stack([mine[time] for time in times]) for name, mine in seen.items()}
