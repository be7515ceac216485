"""Changes of inputs folded into the norm before: then they cost nothing at run time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dq.nn.packed_layer import PackedLayer
from dq.plan import Plan
from dq.transform import Transform

__all__ = ["fold"]


@torch.no_grad()
def fold(model: nn.Module, plan: Plan, fed: Mapping[str, tuple[str, ...]]) -> Plan:
    """Let norms do what packed layers do to their inputs, in place.

    A norm with weight g and bias c puts out g n + c; with (g / s) n + (c - z) / s its layers need
    not shift and scale any more. It has to feed them alone, and all must ask for the same.

    Args:
        model: The denoiser, packed.
        plan: Its plan.
        fed: Norms, and the layers that see what they put out; see `Family.fed`.

    Returns:
        The plan, without the transforms that are folded.
    """
    layers = dict(plan.layers)
    for name, followers in fed.items():
        packed: dict[str, PackedLayer] = {}
        for follower in followers:
            layer = model.get_submodule(follower)
            if isinstance(layer, PackedLayer):
                packed[follower] = layer
        transforms = [each.transform for each in packed.values()]
        if len(packed) < len(followers) or not all(map(_foldable, packed.values())):
            continue
        if not all(_alike(transforms[0], other) for other in transforms):
            continue
        _change(model.get_submodule(name), transforms[0])
        for follower, each in packed.items():
            each.spec = layers[follower] = dataclasses.replace(each.spec, transform=None)
            each.input_shift = each.input_scale = None
    return dataclasses.replace(plan, layers=layers)


def _foldable(layer: PackedLayer) -> bool:
    # Where only the shift has brought a bias, the plan must go on to speak of it.
    changed = layer.spec.transform
    return changed is not None and not changed.rotation and not layer.gained_bias


def _alike(one: Transform, other: Transform) -> bool:
    pairs = zip(one[:2], other[:2], strict=True)
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def _change(norm: Any, transform: Transform) -> None:
    weight, bias = norm.weight.float(), norm.bias.float()
    if transform.shift is not None:
        bias = bias - transform.shift
    if transform.scale is not None:
        weight, bias = weight / transform.scale, bias / transform.scale
    norm.weight = nn.Parameter(weight.to(norm.weight.dtype), norm.weight.requires_grad)
    norm.bias = nn.Parameter(bias.to(norm.bias.dtype), norm.bias.requires_grad)
