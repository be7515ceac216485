"""One layer after the other learns to give what it gives in full precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dq.calls import Call, run
from dq.full_precision import full_precision
from dq.nn.steps import ARGUMENT, by_row
from dq.progress import track
from dq.taps import tap_inputs, tap_outputs
from dq.tuning.loop import Group, Schedule, tune
from dq.tuning.samples import Samples
from dq.work import Work

__all__ = ["align"]


def align(
    model: nn.Module,
    layers: Sequence[str],
    learn: Callable[[str], list[Group]],
    batch: Call,
    schedule: Schedule,
) -> None:
    """Let some layers learn alone, in the order in which they run.

    Each sees what the quantized layers before it give, so that they make up for each other's errors
    (the loss L_TLA of QuEST, Wang et al. 2024, arXiv 2402.03666). For layers that see the timestep
    only, a few rows of data are all there is to know.

    Args:
        model: With simulated layers.
        layers: Their names.
        learn: Makes a layer learnable and says how.
        batch: Arguments of a forward call, with a row for each state of these layers.
        schedule: Of each layer.
    """
    targets: dict[str, Tensor] = {}
    modules = {name: model.get_submodule(name) for name in layers}
    with torch.no_grad(), full_precision(model):
        plain = {name: model.get_submodule(name) for name in layers}
        with tap_outputs(plain, targets.__setitem__):  # in the order of running
            run(model, batch)
    for name in track(list(targets), "aligning"):
        seen: dict[str, Tensor] = {}
        with torch.no_grad(), tap_inputs({name: modules[name]}, seen.__setitem__):
            run(model, batch)
        layer: Any = modules[name]
        call = {"input": seen[name], "target": targets[name]}
        if layer.steps is not None:
            call[ARGUMENT] = by_row(batch[ARGUMENT]).expand(len(seen[name]))
        samples = Samples([call], "input")

        def loss(call: Call, layer: Any = layer) -> Tensor:
            if layer.steps is not None:  # rows come in another order than the denoiser saw them
                layer.steps(layer, (), call)
            return F.mse_loss(layer(call["input"]).float(), call["target"].float())

        tune(learn(name), loss, samples, samples, schedule, Work(None), name)
