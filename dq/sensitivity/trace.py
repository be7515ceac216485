"""What can be seen in one call of a denoiser: which layers run when, on what, at what cost."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dq.calls import run
from dq.family import quantizable
from dq.nn import matrix_shape
from dq.taps import hooked

__all__ = ["Trace", "trace"]


@dataclass
class Trace:
    """One call of a denoiser.

    Attributes:
        order: Layers in the order in which they begin; those that did not run are missing.
        ran: Names of all modules that ran.
        macs: Multiply-adds of each layer, for one image.
        inputs: Shape of each layer's input.
        sharing: Layers that see the very same input tensor, in groups of two and more.
    """

    order: list[str] = field(default_factory=list)
    ran: set[str] = field(default_factory=set)
    macs: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    sharing: list[tuple[str, ...]] = field(default_factory=list)


@torch.no_grad()
def trace(model: nn.Module, arguments: Mapping[str, Any]) -> Trace:
    """Run a denoiser once and note what happens.

    Args:
        model: The denoiser, float.
        arguments: Of its forward.
    """
    found = Trace()
    layers = quantizable(model)
    seen: dict[int, tuple[weakref.ref[Tensor], list[str]]] = {}
    groups: list[list[str]] = []

    def begin(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        found.ran.add(name)
        if name not in layers or name in found.order:
            return
        found.order.append(name)
        found.inputs[name] = tuple(args[0].shape)
        reference, group = seen.get(id(args[0]), (None, []))
        if reference is None or reference() is not args[0]:  # an address may be used again
            group = []
            groups.append(group)
            seen[id(args[0])] = (weakref.ref(args[0]), group)
        group.append(name)

    def end(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        _, columns = matrix_shape(layers[name])
        found.macs[name] = output.numel() // output.shape[0] * columns

    handles = [m.register_forward_pre_hook(partial(begin, n)) for n, m in model.named_modules()]
    handles += [m.register_forward_hook(partial(end, n)) for n, m in layers.items()]
    with hooked(handles):
        run(model, dict(arguments))
    found.sharing = [tuple(group) for group in groups if len(group) > 1]
    return found
