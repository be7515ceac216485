"""How far a quantized denoiser is from itself in full precision, layer by layer and at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dq.calibrate import Call, run, tap_outputs
from dq.full_precision import full_precision
from dq.nn import plain_layers

__all__ = ["Distance", "Distillation"]

Distance = Callable[[Tensor, Tensor], Tensor]


class Distillation:
    """The loss of QuEST (Wang et al. 2024, arXiv 2402.03666): local terms and a global one.

    L = local_weight * sum_l ||O_l(z) - O_l'(z')||^2 + global_weight * ||e(x, t) - e'(x, t)||^2,
    means of squares, where primes are quantized and z' are the quantized network's own inputs.

    The teacher is the same network with its float layers in their places, so that it takes neither
    a second model nor files of targets.

    Args:
        model: With simulated layers.
        layers: Names of those that have a local term; not looked at if these weigh nothing.
        local_weight: Of their sum.
        global_weight: Of the output's term.
        distance: Of two outputs, student's and teacher's, both float32.
        autocast: Dtype of the student's products; None for that of its tensors. The teacher is
            exact in any case: what it says wrongly cannot be unlearned.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        local_weight: float,
        global_weight: float,
        distance: Distance = F.mse_loss,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.layers = tuple(layers) if local_weight else ()
        self.local_weight, self.global_weight = local_weight, global_weight
        self.distance, self.autocast = distance, autocast
        self._plain = plain_layers(model)

    def __call__(self, call: Call) -> Tensor:
        """Return the loss of one batch, a float32 scalar."""
        wanted, expected = self.teacher(call)
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            output, found = self._run(call)
        total = self.global_weight * self.distance(output.float(), wanted.float())
        if self.layers:
            terms = [F.mse_loss(found[n].float(), expected[n].float()) for n in self.layers]
            total = total + self.local_weight * torch.stack(terms).sum()
        return total

    def teacher(self, call: Call) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the output in full precision, and those of the layers with local terms."""
        with torch.no_grad(), full_precision(self.model, self._plain):
            return self._run(call)

    def _run(self, call: Call) -> tuple[Tensor, dict[str, Tensor]]:
        seen: dict[str, Tensor] = {}
        modules = {name: self.model.get_submodule(name) for name in self.layers}
        with tap_outputs(modules, seen.__setitem__):
            return run(self.model, call), seen
