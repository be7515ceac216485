"""How far a quantized denoiser is from itself in full precision, layer by layer and at its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dq.calls import Call, run
from dq.full_precision import full_precision
from dq.nn import plain_layers
from dq.taps import tap_outputs

__all__ = ["Distance", "Distillation", "Local", "sum_of_errors"]

Distance = Callable[[Tensor, Tensor], Tensor]
Features = Mapping[str, Tensor]  # outputs of modules by name, float32
Local = Callable[[Features, Features], Tensor]


def sum_of_errors(student: Features, teacher: Features) -> Tensor:
    """Return the sum of the mean squared errors of all modules."""
    return torch.stack([F.mse_loss(student[n], teacher[n]) for n in teacher]).sum()


class Distillation:
    """The loss of QuEST (Wang et al. 2024, arXiv 2402.03666): local terms and a global one.

    L = local_weight * sum_l ||O_l(z) - O_l'(z')||^2 + global_weight * ||e(x, t) - e'(x, t)||^2,
    means of squares, where primes are quantized and z' are the quantized network's own inputs.

    The teacher is the same network with its float layers in their places, so that it takes neither
    a second model nor files of targets.

    Args:
        model: With simulated layers.
        layers: Names of the modules that have a local term; not looked at if it weighs nothing.
        local_weight: Of the local term.
        global_weight: Of the output's term.
        distance: Of two outputs, student's and teacher's, both float32.
        autocast: Dtype of the student's products; None for that of its tensors. The teacher is
            exact in any case: what it says wrongly cannot be unlearned.
        local: How far the modules' outputs are from each other; of a module that puts out several
            tensors the largest counts.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        local_weight: float,
        global_weight: float,
        distance: Distance = F.mse_loss,
        autocast: torch.dtype | None = None,
        local: Local = sum_of_errors,
    ) -> None:
        self.model = model
        self.layers = tuple(layers) if local_weight else ()
        self.local_weight, self.global_weight = local_weight, global_weight
        self.distance, self.autocast, self.local = distance, autocast, local
        self._plain = plain_layers(model)

    def __call__(self, call: Call) -> Tensor:
        """Return the loss of one batch, a float32 scalar."""
        wanted, expected = self.teacher(call)
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            output, found = self._run(call)
        total = self.global_weight * self.distance(output.float(), wanted.float())
        if self.layers:
            total = total + self.local_weight * self.local(found, expected)
        return total

    def teacher(self, call: Call) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the output in full precision, and those of the layers with local terms."""
        with torch.no_grad(), full_precision(self.model, self._plain):
            return self._run(call)

    def _run(self, call: Call) -> tuple[Tensor, dict[str, Tensor]]:
        seen: dict[str, Tensor] = {}

        def note(name: str, output: Any) -> None:
            seen[name] = _largest(output).float()

        modules = {name: self.model.get_submodule(name) for name in self.layers}
        with tap_outputs(modules, note):
            return run(self.model, call), seen


def _largest(output: Any) -> Tensor:
    """Return the largest tensor of an output: of a block the hidden states."""
    if isinstance(output, Tensor):
        return output
    return max((t for t in output if isinstance(t, Tensor)), key=lambda t: t.numel())
