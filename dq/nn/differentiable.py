"""Gradients through packed layers: adapters train on top of them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from dq.kernels import Kernel
from dq.nn.steps import Steps

__all__ = ["Differentiable"]


class _Layer(Protocol):
    """What is asked of a packed layer here."""

    steps: Steps | None

    @property
    def depends_on_step(self) -> bool: ...

    def run(self, kernel: Kernel, x: Tensor) -> Tensor: ...

    def simulate(self, x: Tensor, bias: Tensor | None) -> Tensor: ...


class Differentiable(torch.autograd.Function):
    """The output of a kernel with the gradient of the simulated form, computed again for it.

    Adapters train on top of packed layers; integer products have no gradient of their own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: _Layer, kernel: Kernel) -> Tensor:
        """Return what the kernel computes."""
        ctx.layer = layer
        ctx.steps = layer.steps if layer.depends_on_step else None
        ctx.now = None if ctx.steps is None else ctx.steps.now()
        ctx.save_for_backward(x, bias)
        return layer.run(kernel, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of input and bias."""
        need = ctx.needs_input_grad
        x, bias = (None if t is None else t.detach() for t in ctx.saved_tensors)
        pairs = ((x, need[0]), (bias, need[1]))
        wanted = [t.requires_grad_() for t, asked in pairs if asked and t is not None]
        # Another call may have come in between, at another step.
        step = nullcontext() if ctx.steps is None else ctx.steps.at(ctx.now)
        with step, torch.enable_grad():
            y = ctx.layer.simulate(x, bias)
        found = iter(torch.autograd.grad(y, wanted, gradients[0]))
        return tuple(next(found) if asked else None for asked in need)
