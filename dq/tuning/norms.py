"""Norms that learn with the weights around them, while the teacher keeps its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from dq.nn.swap import replace

__all__ = ["norms_as_before", "norms_of", "norms_to_learn"]


def norms_of(model: nn.Module) -> dict[str, Any]:
    """Return the norms that have a weight, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        and isinstance(getattr(module, "weight", None), nn.Parameter)
    }


def norms_to_learn(model: nn.Module) -> Mapping[str, nn.Module]:
    """Put copies that learn in the places of a model's norms.

    Returns:
        The norms that were there, by name: those of the teacher.
    """
    norms = norms_of(model)
    for name, norm in norms.items():
        replace(model, name, copy.deepcopy(norm).requires_grad_())
    return norms


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
