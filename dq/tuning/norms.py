"""Norms that learn with the weights around them, while the teacher keeps its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from dq.nn.swap import ORIGINAL, replace

__all__ = ["norms_as_before", "norms_of", "norms_to_learn"]


def norms_of(model: nn.Module) -> dict[str, Any]:
    """Return the norms that have a weight, by name; not those of the teacher."""
    return {
        name: module
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        and isinstance(getattr(module, "weight", None), nn.Parameter)
        and not name.endswith(ORIGINAL)
    }


def norms_to_learn(model: nn.Module) -> dict[str, nn.Module]:
    """Put copies that learn in the places of a model's norms.

    They are float32: steps near 1 are smaller than what bfloat16 tells apart there. Below each is
    the norm that was there before any has learned; see `dq.nn.plain_layers`.

    Returns:
        The copies, by name.
    """
    made = {}
    for name, norm in norms_of(model).items():
        original = norm._modules.pop(ORIGINAL, norm)
        made[name] = copy.deepcopy(norm).float().requires_grad_()
        made[name].add_module(ORIGINAL, original.requires_grad_(False))
        replace(model, name, made[name])
    return made


@contextmanager
def norms_as_before(model: nn.Module) -> Iterator[None]:
    """Give a model's norms the dtype, and the wish for gradients, that they had before."""
    before = {
        name: (norm.weight.dtype, norm.weight.requires_grad)
        for name, norm in norms_of(model).items()
    }
    try:
        yield
    finally:
        for name, norm in norms_of(model).items():
            dtype, learns = before[name]
            norm.to(dtype).requires_grad_(learns)
