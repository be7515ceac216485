"""Give a denoiser's attention processors a faster attention, and take it away again.

diffusers has a processor for every kind of model. What they do around the attention itself, norms,
rotary embeddings, the order of text and image, is left to them: each keeps its own code, and only
the name under which that code finds its attention function means another one.
"""

from __future__ import annotations

import functools
import inspect
from types import FunctionType, ModuleType
from typing import Any

from diffusers.models import attention_dispatch
from torch import Tensor, nn
from torch.nn import functional as F

from dq.kernels.attention import attention, serves

__all__ = ["install", "uninstall"]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute what torch's function of this name does, faster where dq has a way.

    Args:
        query: `(B, H, N, D)`.
        key: `(B, H, M, D)`.
        value: `(B, H, M, D)`.
        attn_mask: As in torch, like all that follow.
        dropout_p: Probability of dropping.
        is_causal: Whether queries see earlier keys only.
        scale: Of the scores; one over the root of D if None.
        enable_gqa: Whether heads share keys.
    """
    factor = float(query.shape[-1] ** -0.5 if scale is None else scale)
    plain = attn_mask is None and not dropout_p and not is_causal and not enable_gqa
    if plain and serves(query, key, value, factor):
        return attention(query, key, value, factor)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def dispatch_attention_fn(
    query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any
) -> Tensor:
    """Compute what diffusers' function of this name does, faster where dq has a way.

    Args:
        query: `(B, N, H, D)`.
        key: `(B, M, H, D)`.
        value: `(B, M, H, D)`.
        *arguments: As in diffusers.
        **options: As in diffusers.
    """
    given = [v for v in (*arguments, *options.values()) if v is not None and v is not False]
    if not any(given):  # 0.0 is no dropout; whatever else is asked for, a scale too, is theirs
        active, _ = attention_dispatch._AttentionBackendRegistry.get_active_backend()
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        factor = float(query.shape[-1] ** -0.5)
        if active == attention_dispatch.AttentionBackendName.NATIVE and serves(q, k, v, factor):
            return attention(q, k, v, factor).transpose(1, 2)
    return attention_dispatch.dispatch_attention_fn(query, key, value, *arguments, **options)


def _functional() -> ModuleType:
    """Return torch.nn.functional with another attention."""
    made = ModuleType("dq.functional", F.__doc__)
    made.__dict__.update(
        {name: value for name, value in vars(F).items() if not name.startswith("__")},
        scaled_dot_product_attention=scaled_dot_product_attention,
    )
    return made


_NAMES: dict[str, Any] = {"F": _functional(), "dispatch_attention_fn": dispatch_attention_fn}


def _rebuilt(kind: type, state: dict[str, Any]) -> Any:
    """Make a processor again from what a pickle or a copy knows of it."""
    faster = _faster(kind) or kind
    made: Any = object.__new__(faster)
    made.__dict__.update(state)
    return made


@functools.cache
def _faster(kind: type) -> type | None:
    """Return a subclass of a processor class whose code finds our attention, or None."""
    call = inspect.getattr_static(kind, "__call__", None)
    if not isinstance(call, FunctionType) or issubclass(kind, nn.Module):
        return None
    theirs = {"F": F, "dispatch_attention_fn": attention_dispatch.dispatch_attention_fn}
    found = {
        name: ours
        for name, ours in _NAMES.items()
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
        "__reduce__": lambda self: (_rebuilt, (kind, self.__dict__)),
        "_dq_original": kind,
    }
    return type(kind.__name__, (kind,), body)


def install(model: nn.Module) -> int:
    """Make the attention processors of a model use dq's attention.

    Those that are modules (IP-Adapters) or do not call a known function stay as they are.

    Returns:
        Number of processors that do now.
    """
    count = 0
    for module in model.modules():
        processor = getattr(module, "processor", None)
        if processor is None or hasattr(processor, "_dq_original"):
            continue
        kind: type = type(processor)
        if _faster(kind) is not None:
            module.processor = _rebuilt(kind, dict(vars(processor)))
            count += 1
    return count


def uninstall(model: nn.Module) -> None:
    """Undo `install`."""
    for module in model.modules():
        processor = getattr(module, "processor", None)
        original = getattr(processor, "_dq_original", None)
        if original is not None:
            made = object.__new__(original)
            made.__dict__.update(vars(processor))
            module.processor = made
