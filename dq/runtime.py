"""What else than its packed layers makes a quantized denoiser fast; none of it changes a file."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from dq import attention
from dq.attention_spec import AttentionSpec
from dq.errors import DQError
from dq.family import Role, family_of
from dq.nn import PackedLayer, norm, packed_layers
from dq.nn.kept import note
from dq.nn.steps import watch
from dq.tokens.layout import TokenLayout

__all__ = ["compile_blocks", "install", "remember_prompts", "uninstall"]

logger = logging.getLogger("dq")


def install(model: nn.Module, specs: Mapping[str, AttentionSpec] = MappingProxyType({})) -> None:
    """Give a denoiser the attention and the norms that suit packed layers, in place.

    Args:
        model: The denoiser.
        specs: Of attentions with quantized operands, by name.
    """
    attention.install(model, specs)
    norm.install(model)
    remember_prompts(model, True)
    _note_kept_tokens(model)
    _watch_attention(model)
    watch(model)


def uninstall(model: nn.Module) -> None:
    """Undo `install`."""
    attention.uninstall(model)
    norm.uninstall(model)
    remember_prompts(model, False)
    _forget_kept_tokens(model)
    _watch_attention(model)  # none
    watch(model)  # no packed layer is left that asks for the timestep


def remember_prompts(model: nn.Module, yes: bool) -> None:
    """Compute k and v of a prompt once a generation instead of once a step, or not.

    Pipelines give a denoiser the same tensor at every step; what a packed layer made of it is kept
    as long as that tensor lives. The result is the very same. It takes two numbers a token and
    channel of each cross-attention.

    Args:
        model: The denoiser.
        yes: Whether.
    """
    try:
        roles = family_of(model).roles(model)
    except DQError:  # packed with a family that is not installed here: it runs all the same
        return
    for name, layer in packed_layers(model).items():
        layer.remembers = yes and roles[name] is Role.CROSS_KV


def _note_kept_tokens(model: Any) -> None:
    """Look at the kept tokens of a prompt once a forward; layers then need not look themselves."""
    _forget_kept_tokens(model)
    known = [layer for layer in packed_layers(model).values() if layer.kept_input is not None]
    try:
        name = family_of(model).prompt(model)
    except DQError:  # see `remember_prompts`
        return
    if not known or not name or not all(_alike(layer, known[0]) for layer in known):
        return
    place = list(inspect.signature(type(model).forward).parameters).index(name) - 1

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = kwargs.get(name, args[place] if len(args) > place else None)
        reference = known[0].kept_input
        if torch.compiler.is_compiling() or not isinstance(x, Tensor) or reference is None:
            return
        if x.shape[-1] == len(reference):  # a projection that follows makes another tensor of it
            note(x, known[0].spec.kept_every, reference)

    model._dq_kept = model.register_forward_pre_hook(look, with_kwargs=True)


def _alike(one: PackedLayer, other: PackedLayer) -> bool:
    """Whether two layers keep the same token."""
    assert one.kept_input is not None and other.kept_input is not None  # the caller has chosen them
    same = one.spec.kept_every == other.spec.kept_every
    return same and torch.equal(one.kept_input, other.kept_input)


def _forget_kept_tokens(model: Any) -> None:
    if hasattr(model, "_dq_kept"):
        model._dq_kept.remove()
        del model._dq_kept


def _watch_attention(model: Any) -> None:
    """Look at each call: whether attentions are still what the plan says, and fit its tokens."""
    if hasattr(model, "_dq_attention"):
        model._dq_attention.remove()
        del model._dq_attention
    specs = attention.specs_of(model)
    if not specs:
        return
    wanted = {spec.tokens.layout for spec in specs.values() if spec.tokens is not None}
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    told: set[str] = set()

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return  # of a model that is compiled as a whole
        lost = attention.lost(module, specs)
        if lost - told:
            told.update(lost)
            logger.warning(
                "%d attentions of this %s, the first is %s, no longer are what its plan says: "
                "their processors were replaced. Call dq.runtime.install(model, plan.attention) "
                "to have them back",
                len(lost),
                type(module).__name__,
                min(lost),
            )
        if wanted:
            _check_grids(module, wanted, {**dict(zip(names, args, strict=False)), **kwargs})

    model._dq_attention = model.register_forward_pre_hook(look, with_kwargs=True)


def _check_grids(model: nn.Module, wanted: set[TokenLayout], call: Mapping[str, Any]) -> None:
    """Refuse calls whose tokens form another grid than the one that masks were found on.

    Attentions count tokens themselves; a grid of as many, but of another form, looks the same to
    them.
    """
    try:
        family = family_of(model)
    except DQError:  # see `remember_prompts`
        return
    there = family.layouts(model, call)
    missing = wanted - set(there)
    if missing:
        raise DQError(
            f"the attention of this {type(model).__name__} was calibrated for tokens of "
            f"{', '.join(sorted(map(str, missing)))}; this call has "
            f"{', '.join(map(str, there)) or 'no grid'}. Draw images of that size (and prompts "
            "of that length), or quantize again at this one"
        )


def compile_blocks(model: nn.Module, **options: Any) -> int:
    """Compile the blocks of a denoiser one by one, in place: much faster than all of it at once.

    Blocks of the same form share one compiled graph. It is what diffusers'
    `compile_repeated_blocks` does, also for models that do not say which of their blocks repeat.

    Args:
        model: The denoiser, quantized or not.
        **options: For `torch.compile`; `fullgraph=True` unless said otherwise.

    Returns:
        Number of compiled modules.
    """
    kinds = set(getattr(model, "_repeated_blocks", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in kinds]
    blocks = found or [model.get_submodule(name) for name in family_of(model).blocks(model)]
    for block in blocks:
        block.compile(**{"fullgraph": True, **options})
    return len(blocks)
