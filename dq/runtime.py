"""What else than its packed layers makes a quantized denoiser fast; none of it changes a file."""

from __future__ import annotations

from typing import Any

from torch import nn

from dq import attention
from dq.errors import DQError
from dq.family import Role, family_of
from dq.nn import norm, packed_layers

__all__ = ["compile_blocks", "install", "remember_prompts", "uninstall"]


def install(model: nn.Module) -> None:
    """Give a denoiser the attention and the norms that suit packed layers, in place."""
    attention.install(model)
    norm.install(model)
    remember_prompts(model, True)


def uninstall(model: nn.Module) -> None:
    """Undo `install`."""
    attention.uninstall(model)
    norm.uninstall(model)
    remember_prompts(model, False)


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
