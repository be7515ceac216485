"""What methods may know about a model: a record, and the registry of families.

Methods select layers by role, never by name; names are known here and in `dq.pipelines` only.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import nn

from dq.errors import DQError, check_known, unknown
from dq.registry import Registry
from dq.tokens.layout import TokenLayout

__all__ = [
    "SMALLEST",
    "WIDE_ROLES",
    "Family",
    "Role",
    "assign_roles",
    "check_roles",
    "check_scaling",
    "ends",
    "families",
    "family_of",
    "quantizable",
]

SMALLEST = 1024  # layers of fewer weights are not worth quantizing
_SCALINGS = ("auto", "static", "dynamic")


class Role(StrEnum):
    """What a layer does in a denoiser."""

    IO = "io"  # first and last layers, which face pixels or latents
    TIME = "time"  # embeddings of timestep, size, pooled text, and their projections into blocks
    MODULATION = "modulation"  # adaptive layer norm: shift, scale and gate
    CAPTION = "caption"  # projection of text embeddings before the blocks
    CONVOLUTION = "convolution"  # residual blocks and resampling
    SKIP = "skip"  # shortcuts that see a raw concatenation of two sources
    PROJECTION = "projection"  # into and out of a stack of transformer blocks
    SELF_ATTENTION = "self-attention"
    CROSS_ATTENTION = "cross-attention"  # q and output
    CROSS_KV = "cross-k/v"  # k and v of text
    FEED_FORWARD = "feed-forward"


# A small part of the weights, on which every pixel depends: uniform recipes leave them 8 bits.
WIDE_ROLES = (Role.IO, Role.TIME)


@dataclass(frozen=True)
class Family:
    """A kind of denoiser.

    Args:
        name: How messages call it, e.g. "unet".
        denoiser: Name of the pipeline component, "unet" or "transformer".
        classes: Class names of denoisers that it describes.
        roles: Role of each Linear and Conv2d, by module name.
        blocks: Names of the modules that repeat, in the order in which they run.
        splits: Sizes of the channel segments of inputs that are raw concatenations, by module name.
        sample_inputs: Keyword arguments of a forward call, from (model, batch, generator): random,
            of the right shapes and dtypes, for tests and benchmarks.
        prompt: Name of the argument whose tokens enter the cross-attention and may come from a
            causal text encoder, by denoiser; empty if there is none.
        fed: Names of norms with a weight and a bias for each channel, and the layers that see what
            they put out; nothing else may see it. Changes of inputs are folded into such norms.
        timed: Names of the layers that see nothing but the timestep, so that their outputs can be
            stored for those of a schedule.
        output: Name of the last layer; empty if it is not one Linear or Conv2d.
        outer: Names of the modules near to input and output: of UNets those whose features have
            half of the resolution or more, of transformers the first and the last blocks.
        layouts: Where the tokens of the self-attentions of a call come from, from (model, arguments
            by name): one for each number of tokens that is met; none for what is not a grid.
        dynamic_inputs: Whether activations are quantized by token at run time unless a recipe says
            otherwise: transformers, where channels of few tokens dominate static ranges.
        logits_axis: Axis of the output that holds logits over a vocabulary of tokens; None for
            models that predict noise, a velocity or an image, as most do.
    """

    name: str
    denoiser: str
    classes: tuple[str, ...]
    roles: Callable[[nn.Module], Mapping[str, Role]]
    blocks: Callable[[nn.Module], tuple[str, ...]]
    splits: Callable[[nn.Module], Mapping[str, tuple[int, ...]]]
    sample_inputs: Callable[[nn.Module, int, torch.Generator], dict[str, Any]]
    prompt: Callable[[nn.Module], str] = lambda model: ""
    fed: Callable[[nn.Module], Mapping[str, tuple[str, ...]]] = lambda model: {}
    timed: Callable[[nn.Module], tuple[str, ...]] = lambda model: ()
    output: Callable[[nn.Module], str] = lambda model: ""
    outer: Callable[[nn.Module], tuple[str, ...]] = lambda model: ()
    layouts: Callable[[nn.Module, Mapping[str, Any]], tuple[TokenLayout, ...]] = lambda m, call: ()
    dynamic_inputs: bool = False
    logits_axis: int | None = None

    def is_dynamic(self, scaling: str) -> bool:
        """Return whether the scales of inputs are found at run time.

        Args:
            scaling: "static", "dynamic", or "auto": what the family prefers; see `check_scaling`.
        """
        return scaling == "dynamic" or (scaling == "auto" and self.dynamic_inputs)


def check_scaling(argument: str, value: str) -> None:
    """Check what a method is told about the scales of inputs, before it knows the family.

    Args:
        argument: Name of the method's argument.
        value: What it was given.

    Raises:
        DQError: If it is none of "auto", "static" and "dynamic".
    """
    if value not in _SCALINGS:
        raise unknown(f"value of {argument}", value, _SCALINGS)


def ends(blocks: Sequence[str], share: float = 0.15) -> tuple[str, ...]:
    """Return as many blocks of each end as are that share of all, but at least one."""
    each = max(1, round(share * len(blocks) / 2))
    return tuple(dict.fromkeys((*blocks[:each], *blocks[-each:])))


def check_roles(roles: Iterable[str]) -> None:
    """Check what a method is told about roles.

    Raises:
        DQError: If one of them is no role.
    """
    check_known("role", roles, tuple(Role))


families: Registry[Family] = Registry("family", home="dq.pipelines")


def family_of(model: nn.Module) -> Family:
    """Return the family that describes `model`.

    Raises:
        DQError: If none does; lists the classes that are known.
    """
    name = type(model).__name__
    known: list[str] = []
    for _, family in families.items():
        if name in family.classes:
            return family
        known += family.classes
    raise DQError(
        f"no family describes {name}; known: {', '.join(sorted(known))}. "
        "A family is one file, see CONTRIBUTING.md, 'Add a family'."
    )


_ADAPTERS = frozenset({"processor", "image_projection_layers"})


def quantizable(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return all Linear and Conv2d layers by module name, in the order of the model.

    Layers that an IP-Adapter has added are left out: the denoiser's checkpoint does not hold them,
    and diffusers casts images to the dtype of their weights.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and _ADAPTERS.isdisjoint(name.split("."))
    }


def assign_roles(model: nn.Module, table: tuple[tuple[str, Role], ...]) -> dict[str, Role]:
    """Give each Linear and Conv2d the role of the first pattern that matches its name.

    Raises:
        DQError: If no pattern matches a layer: a family has to know all of its layers.
    """
    roles = {}
    for name in quantizable(model):
        role = next((role for pattern, role in table if fnmatch.fnmatchcase(name, pattern)), None)
        if role is None:
            raise DQError(
                f"{type(model).__name__}: the family has no role for layer {name}; add a pattern"
            )
        roles[name] = role
    return roles
