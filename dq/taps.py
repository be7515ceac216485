"""Taps: what enters and leaves named layers while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["hooked", "tap_inputs", "tap_outputs"]


@contextmanager
def tap_inputs(
    layers: Mapping[str, nn.Module], seen: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """While active, call `seen(name, input)` at each forward call of the named layers."""

    def hook(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        seen(name, args[0].detach())

    with hooked([m.register_forward_pre_hook(partial(hook, n)) for n, m in layers.items()]):
        yield


@contextmanager
def tap_outputs(
    layers: Mapping[str, nn.Module], seen: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """While active, call `seen(name, output)` at each forward call of the named layers."""

    def hook(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen(name, output)

    with hooked([m.register_forward_hook(partial(hook, n)) for n, m in layers.items()]):
        yield


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end, whatever happens."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield
