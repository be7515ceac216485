"""Give a denoiser's attention processors another attention, and take it away again.

A faster one, or, at sites where a plan says so, one with quantized operands.

diffusers has a processor for every kind of model. What they do around the attention itself, norms,
rotary embeddings, the order of text and image, is left to them: each keeps its own code, and only
the name under which that code finds its attention function means another one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, MappingProxyType, ModuleType
from typing import Any

from diffusers.models import attention_dispatch
from torch import Tensor, nn
from torch.nn import functional as F

from dq.attention.functions import (
    dispatch_attention_fn,
    quantized,
    scaled_dot_product_attention,
)
from dq.attention_spec import AttentionSpec
from dq.errors import unknown

__all__ = ["exact", "install", "quantize", "sites", "specs_of", "uninstall"]


def _functional(attention: Callable[..., Tensor]) -> ModuleType:
    """Return torch.nn.functional with another attention."""
    made = ModuleType("dq.functional", F.__doc__)
    made.__dict__.update(
        {name: value for name, value in vars(F).items() if not name.startswith("__")},
        scaled_dot_product_attention=attention,
    )
    return made


@functools.cache
def _names(spec: AttentionSpec | None) -> dict[str, Any]:
    """Return what processors' code finds under the names of attention functions."""
    functions = (scaled_dot_product_attention, dispatch_attention_fn)
    torch_like, diffusers_like = functions if spec is None else quantized(spec)
    return {"F": _functional(torch_like), "dispatch_attention_fn": diffusers_like}


def _rebuilt(kind: type, state: dict[str, Any], spec: AttentionSpec | None = None) -> Any:
    """Make a processor again from what a pickle or a copy knows of it."""
    changed = _changed(kind, spec) or kind
    made: Any = object.__new__(changed)
    made.__dict__.update(state)
    return made


@functools.cache
def _changed(kind: type, spec: AttentionSpec | None) -> type | None:
    """Return a subclass of a processor class whose code finds our attention, or None."""
    call = inspect.getattr_static(kind, "__call__", None)
    if not isinstance(call, FunctionType) or issubclass(kind, nn.Module):
        return None
    theirs = {"F": F, "dispatch_attention_fn": attention_dispatch.dispatch_attention_fn}
    found = {
        name: ours
        for name, ours in _names(spec).items()
        if name in call.__code__.co_names and call.__globals__.get(name) is theirs[name]
    }
    if not found:
        return None
    names = {**call.__globals__, **found}
    del names["__name__"]  # torch.compile would look the names up in the module that is called so
    made = FunctionType(call.__code__, names, call.__name__, call.__defaults__, call.__closure__)
    made.__kwdefaults__, made.__module__ = call.__kwdefaults__, call.__module__
    made.__signature__ = inspect.signature(call)  # type: ignore[attr-defined] # read at every call
    body = {
        "__call__": made,
        "__module__": kind.__module__,
        "__reduce__": lambda self: (_rebuilt, (kind, self.__dict__, spec)),
        "_dq_original": kind,
        "_dq_spec": spec,
    }
    return type(kind.__name__, (kind,), body)


def sites(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules whose attention can be changed, in the model's order.

    Those with processors that are modules (IP-Adapters) or call no known function are left out.
    """
    return tuple(name for name, module in model.named_modules() if _reachable(module))


def _reachable(module: nn.Module) -> bool:
    processor = getattr(module, "processor", None)
    kind: type = getattr(processor, "_dq_original", type(processor))
    return processor is not None and _changed(kind, None) is not None


def install(model: nn.Module, specs: Mapping[str, AttentionSpec] = MappingProxyType({})) -> int:
    """Make the attention processors of a model use dq's attention.

    Args:
        model: The denoiser.
        specs: Of the sites whose operands are quantized, by name.

    Returns:
        Number of processors that did not before.

    Raises:
        DQError: If the specs name a site that the model lacks.
    """
    known = sites(model)
    for name in specs:
        if name not in known:
            raise unknown(f"attention of this {type(model).__name__}", name, known)
    return sum(_give(model.get_submodule(name), specs.get(name)) for name in known)


def quantize(model: nn.Module, specs: Mapping[str, AttentionSpec]) -> None:
    """Quantize the operands of some sites, in place; the others become what they were.

    Args:
        model: The denoiser.
        specs: By name.

    Raises:
        DQError: If the specs name a site that the model lacks.
    """
    install(model, specs)
    for name in sites(model):
        if name not in specs:
            _take_back(model.get_submodule(name))


def specs_of(model: nn.Module) -> dict[str, AttentionSpec]:
    """Return how operands are quantized now, by site; those that are not are left out."""
    found = ((n, getattr(m, "processor", None)) for n, m in model.named_modules())
    specs = ((name, getattr(processor, "_dq_spec", None)) for name, processor in found)
    return {name: spec for name, spec in specs if spec is not None}


def uninstall(model: nn.Module) -> None:
    """Undo `install`."""
    for name in sites(model):
        _take_back(model.get_submodule(name))


@contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """While active, no attention of a model has quantized operands."""
    before: dict[str, Any] = {}
    for name in specs_of(model):
        module: Any = model.get_submodule(name)
        before[name] = module.processor
        _take_back(module)
    try:
        yield
    finally:
        for name, processor in before.items():
            model.get_submodule(name).processor = processor


def _give(module: Any, spec: AttentionSpec | None) -> bool:
    """Give a site our attention; return whether it had another one."""
    processor = module.processor
    kind = getattr(processor, "_dq_original", None)
    if kind is not None and processor._dq_spec == spec:
        return False
    module.processor = _rebuilt(kind or type(processor), dict(vars(processor)), spec)
    return True


def _take_back(module: Any) -> None:
    """Give a site its own attention again."""
    original = getattr(module.processor, "_dq_original", None)
    if original is not None:
        made = object.__new__(original)
        made.__dict__.update(vars(module.processor))
        module.processor = made
