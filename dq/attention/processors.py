"""Give a denoiser's attention processors another attention, and take it away again.

A faster one, or, at sites where a plan says so, one with quantized operands or ordered tokens.

diffusers has a processor for every kind of model. What they do around the attention itself, norms,
rotary embeddings, the order of text and image, is left to them: each keeps its own code, and only
the name under which that code finds its attention function means another one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, MappingProxyType, ModuleType
from typing import Any

import torch
from diffusers.models import attention_dispatch
from torch import Tensor, nn
from torch.nn import functional as F

from dq.attention.functions import (
    Pair,
    changed,
    current,
    dispatch_attention_fn,
    scaled_dot_product_attention,
    watched,
)
from dq.attention.ordered import formats_by_block
from dq.attention_spec import AttentionSpec
from dq.errors import check_known
from dq.kernels import block_sparse
from dq.nn.steps import watch
from dq.nn.token_site import SITE, TokenSite
from dq.tokens.choice import Chosen

__all__ = [
    "change",
    "empty_sites",
    "exact",
    "install",
    "lost",
    "path",
    "site_of",
    "sites",
    "specs_of",
    "tapped",
    "uninstall",
]


_ANY = 64  # features of a head: no way is chosen by them


def _functional(attention: Callable[..., Tensor]) -> ModuleType:
    """Return torch.nn.functional with another attention."""
    made = ModuleType("dq.functional", F.__doc__)
    made.__dict__.update(
        {name: value for name, value in vars(F).items() if not name.startswith("__")},
        scaled_dot_product_attention=attention,
    )
    return made


def _names(pair: Pair) -> dict[str, Any]:
    """Return what processors' code finds under the names of attention functions."""
    torch_like, diffusers_like = pair
    return {"F": _functional(torch_like), "dispatch_attention_fn": diffusers_like}


def _rebuilt(kind: type, state: dict[str, Any], spec: AttentionSpec | None = None) -> Any:
    """Make a processor again from what a pickle or a copy knows of it."""
    return _of_class(_changed(kind, spec) or kind, state)


def _of_class(kind: type, state: Mapping[str, Any]) -> Any:
    """Make a processor of a class with what another one knows."""
    made: Any = object.__new__(kind)
    made.__dict__.update(state)
    return made


@functools.cache
def _changed(kind: type, spec: AttentionSpec | None) -> type | None:
    """Return a subclass of a processor class whose code finds our attention, or None."""
    pair = (scaled_dot_product_attention, dispatch_attention_fn)
    return _subclass(kind, pair if spec is None else changed(spec), spec)


def _subclass(kind: type, pair: Pair, spec: AttentionSpec | None) -> type | None:
    call = inspect.getattr_static(kind, "__call__", None)
    if not isinstance(call, FunctionType) or issubclass(kind, nn.Module):
        return None
    theirs = {"F": F, "dispatch_attention_fn": attention_dispatch.dispatch_attention_fn}
    found = {
        name: ours
        for name, ours in _names(pair).items()
        if name in call.__code__.co_names and call.__globals__.get(name) is theirs[name]
    }
    if not found:
        return None
    names = {**call.__globals__, **found}
    del names["__name__"]  # torch.compile would look the names up in the module that is called so
    made = FunctionType(call.__code__, names, call.__name__, call.__defaults__, call.__closure__)
    made.__kwdefaults__, made.__module__ = call.__kwdefaults__, call.__module__
    ordered = spec is not None and spec.tokens is not None
    called: Any = _with_site(made) if ordered else made
    called.__signature__ = inspect.signature(call)  # read at every call
    body = {
        "__call__": called,
        "__module__": kind.__module__,
        "__reduce__": lambda self: (_rebuilt, (kind, self.__dict__, spec)),
        "_dq_original": kind,
        "_dq_spec": spec,
    }
    return type(kind.__name__, (kind,), body)


def _with_site(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a processor's code that lets its attention function know what is stored for it."""

    def called(self: Any, attn: Any, *args: Any, **options: Any) -> Tensor:
        before, current.site = current.site, getattr(attn, SITE)
        try:
            return call(self, attn, *args, **options)
        finally:
            current.site = before

    return called


def sites(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules whose attention can be changed, in the model's order.

    Those with processors that are modules (IP-Adapters) or call no known function are left out.
    """
    return tuple(name for name, module in model.named_modules() if _reachable(module))


def _original(module: nn.Module) -> type:
    """Return the class of a processor as diffusers has made it."""
    processor = getattr(module, "processor", None)
    kind: type = getattr(processor, "_dq_original", type(processor))
    return kind


def _reachable(module: nn.Module) -> bool:
    there = getattr(module, "processor", None) is not None
    return there and _changed(_original(module), None) is not None


def install(model: nn.Module, specs: Mapping[str, AttentionSpec] = MappingProxyType({})) -> int:
    """Make the attention processors of a model use dq's attention.

    Args:
        model: The denoiser.
        specs: Of the attentions that a plan changes, by name. Those with ordered tokens have a
            `TokenSite` below them already.

    Returns:
        Number of processors that did not before.

    Raises:
        DQError: If the specs name a site that the model lacks.
    """
    known = sites(model)
    _check(model, specs, known)
    return sum(_give(model.get_submodule(name), specs.get(name)) for name in known)


def _check(model: nn.Module, specs: Iterable[str], known: tuple[str, ...]) -> None:
    check_known(f"attention of this {type(model).__name__}", specs, known)


def change(
    model: nn.Module,
    specs: Mapping[str, AttentionSpec],
    chosen: Mapping[str, Chosen] = MappingProxyType({}),
) -> None:
    """Change some attentions, in place; the others become what they were.

    Args:
        model: The denoiser.
        specs: By name.
        chosen: Orders and masks of those with ordered tokens, by name.

    Raises:
        DQError: If the specs name a site that the model lacks.
    """
    known = sites(model)
    _check(model, specs, known)
    for name in known:
        module, spec = model.get_submodule(name), specs.get(name)
        if spec is None or spec.tokens is None:
            _without_tokens(module)
        elif name in chosen:
            setattr(module, SITE, TokenSite(spec.tokens, chosen[name]))
    install(model, specs)
    for name in known:
        if name not in specs:
            _take_back(model.get_submodule(name))
    watch(model)


def empty_sites(model: nn.Module, specs: Mapping[str, AttentionSpec]) -> None:
    """Prepare attentions with ordered tokens for what a file holds of them, on the meta device."""
    _check(model, specs, sites(model))
    for name, spec in specs.items():
        if spec.tokens is not None:
            empty = TokenSite(spec.tokens, device=torch.device("meta"))
            setattr(model.get_submodule(name), SITE, empty)


def specs_of(model: nn.Module) -> dict[str, AttentionSpec]:
    """Return how attentions are changed now, by site; those that are not are left out."""
    found = ((n, getattr(m, "processor", None)) for n, m in model.named_modules())
    specs = ((name, getattr(processor, "_dq_spec", None)) for name, processor in found)
    return {name: spec for name, spec in specs if spec is not None}


def lost(model: nn.Module, specs: Mapping[str, AttentionSpec]) -> set[str]:
    """Return the names of attentions that are no longer changed as they were.

    diffusers replaces processors where adapters are loaded, projections fused or attention sliced.

    Args:
        model: The denoiser, or a copy.
        specs: What the attentions became.
    """
    if getattr(model, "_dq_lent", False):
        return set()
    found = ((name, getattr(model.get_submodule(name), "processor", None)) for name in specs)
    return {name for name, p in found if getattr(p, "_dq_spec", None) != specs[name]}


def site_of(module: nn.Module) -> TokenSite | None:
    """Return what an attention stores of ordered tokens; None if it has none."""
    site = getattr(module, SITE, None)
    assert site is None or isinstance(site, TokenSite)  # nothing else has that name
    return site


def path(model: nn.Module, spec: AttentionSpec, site: TokenSite | None) -> str:
    """Return in words what a changed attention computes where the model lies.

    Args:
        model: The denoiser, whose dtype is that of operands.
        spec: What is changed.
        site: What it stores of ordered tokens.
    """
    if site is None or spec.by_token:
        return "simulated"
    like = next(p for p in model.parameters() if p.is_floating_point())
    shape = 1, site.spec.heads, site.spec.layout.tokens, _ANY
    q = torch.empty(shape, dtype=like.dtype, device=like.device)
    return block_sparse.path(q, q, q, site.live(), formats_by_block(spec))


def uninstall(model: nn.Module) -> None:
    """Undo `install`."""
    for name in sites(model):
        _take_back(model.get_submodule(name))
        _without_tokens(model.get_submodule(name))


@contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """While active, no attention of a model is changed."""
    with _others(model, dict.fromkeys(specs_of(model))):
        yield


@contextmanager
def tapped(
    model: nn.Module,
    names: Iterable[str],
    seen: Callable[[str, Tensor, Tensor, Tensor, float], None],
) -> Iterator[None]:
    """While active, attentions are as diffusers has made them, and say what they are given.

    Args:
        model: The denoiser.
        names: Of the attentions.
        seen: Is told the name, q, k and v, `(B, H, N, D)` and `(B, H, M, D)` the others, and the
            scale.
    """
    pairs = {name: watched(functools.partial(seen, name)) for name in names}
    with _others(model, pairs):
        yield


@contextmanager
def _others(model: nn.Module, pairs: Mapping[str, Pair | None]) -> Iterator[None]:
    """While active, some attentions have other functions; None for those of diffusers."""
    before: dict[str, Any] = {}
    lent = getattr(model, "_dq_lent", False)
    model._dq_lent = True  # type: ignore[assignment]  # for `lost`
    for name, pair in pairs.items():
        module: Any = model.get_submodule(name)
        before[name] = module.processor
        _take_back(module)
        if pair is not None:
            kind = _subclass(_original(module), pair, None)
            assert kind is not None  # the caller has asked for what can be changed
            module.processor = _of_class(kind, vars(module.processor))
    try:
        yield
    finally:
        model._dq_lent = lent  # type: ignore[assignment]
        for name, processor in before.items():
            model.get_submodule(name).processor = processor


def _give(module: Any, spec: AttentionSpec | None) -> bool:
    """Give a site our attention; return whether it had another one."""
    processor = module.processor
    kind = getattr(processor, "_dq_original", None)
    if kind is not None and processor._dq_spec == spec:
        return False
    module.processor = _rebuilt(kind or type(processor), vars(processor), spec)
    return True


def _take_back(module: Any) -> None:
    """Give a site its own attention again."""
    original = getattr(module.processor, "_dq_original", None)
    if original is not None:
        module.processor = _of_class(original, vars(module.processor))


def _without_tokens(module: Any) -> None:
    if hasattr(module, SITE):
        delattr(module, SITE)
