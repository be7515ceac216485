"""Tokens that are computed apart: the begin-of-sentence token of prompts.

CLIP's text encoders are causal, so their first token sees nothing but itself and is the same vector
for every prompt, with values some fifty times larger than those of the others. A static scale that
reaches it leaves the others no levels. Layers that see prompts therefore know that vector and what
full precision makes of it (MixDQ, Zhao et al. 2024, arXiv 2405.17873). Whether a prompt really
begins with it is looked at first:

| the token is                           | its output is                           |
|----------------------------------------|-----------------------------------------|
| the known vector                       | the stored, full-precision output       |
| all zeros (SDXL's empty prompt)        | the bias                                |
| anything else (clip skip, adapters of  | the product of the float token with the |
| the text encoder, weighted prompts...) | layer's weight, as its codes stand for  |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["KNOWN", "OTHER", "ZERO", "apart", "kinds", "note", "others"]

KNOWN, ZERO, OTHER = 0, 1, 2

# Encoders round differently for other batch sizes; a step of bfloat16 is 2^-8. Of typical values,
# not of the largest: beside that one, all the others could be anything.
_TOLERANCE = 2.0**-6


class _Note(NamedTuple):
    """What rides on a prompt: the kinds of its kept tokens, as they were at one version of it."""

    version: int | None
    reference: Tensor
    kinds: Tensor
    others: bool


def kinds(tokens: Tensor, reference: Tensor) -> Tensor:
    """Return what each token is.

    Args:
        tokens: `(..., K)`.
        reference: `(K,)`, the known vector.

    Returns:
        `(...)` int8 of `KNOWN`, `ZERO` and `OTHER`.
    """
    x, known = tokens.float(), reference.float()
    within = _TOLERANCE * (known.abs() + known.abs().mean())
    is_known = ((x - known).abs() <= within).all(-1)
    is_zero = (x == 0).all(-1)
    return torch.where(is_zero, ZERO, torch.where(is_known, KNOWN, OTHER)).to(torch.int8)


def others(x: Tensor, every: int) -> Tensor:
    """Return the tokens `(n, K)` of a prompt `(..., T, K)` that are not computed apart.

    Args:
        x: `(..., T, K)`.
        every: The first of so many tokens is.
    """
    wanted = torch.arange(x.shape[-2], device=x.device) % every != 0
    return x[..., wanted, :].reshape(-1, x.shape[-1])


def note(x: Tensor, every: int, reference: Tensor) -> None:
    """Look at the kept tokens of a prompt once, for all layers that will see it.

    Args:
        x: `(..., T, K)`; pipelines pass the same tensor on at every step.
        every: The first of so many tokens is kept.
        reference: `(K,)`.
    """
    known = _noted(x)
    if known is None or known.reference is not reference or x.is_inference():
        x.__dict__["_dq_kept"] = _looked_at(x, every, reference)


def _looked_at(x: Tensor, every: int, reference: Tensor) -> _Note:
    found = kinds(x[..., ::every, :], reference)
    return _Note(_version(x), reference, found, bool((found == OTHER).any()))


def _noted(x: Tensor) -> _Note | None:
    known: _Note | None = x.__dict__.get("_dq_kept")
    return known if known is not None and known.version == _version(x) else None


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


def apart(
    x: Tensor,
    y: Tensor,
    every: int,
    reference: Tensor,
    output: Tensor,
    weight: Callable[[], Tensor],
    bias: Tensor | None,
) -> Tensor:
    """Replace the outputs of kept tokens.

    Args:
        x: Input of a linear layer, `(..., T, K)`.
        y: Its quantized output, `(..., T, N)`.
        every: The first of so many tokens is kept.
        reference: `(K,)`, the known vector.
        output: `(N,)`, what full precision makes of it.
        weight: Returns the float weight `(N, K)`; called only if a token is neither the known one
            nor zero, or while a graph is traced, where values must not decide.
        bias: `(N,)` or None.

    Returns:
        `(..., T, N)` in the dtype of `y`.
    """
    tokens = x[..., ::every, :]
    if torch.compiler.is_compiling():
        found, others = kinds(tokens, reference), True
    else:
        _, _, found, others = _noted(x) or _looked_at(x, every, reference)
    found = found.unsqueeze(-1)
    zeros = torch.zeros_like(output) if bias is None else bias
    kept = torch.where(found == KNOWN, output.to(y.dtype), zeros.to(y.dtype))
    if others:
        computed = F.linear(tokens, weight().to(x.dtype), bias)
        kept = torch.where(found == OTHER, computed.to(y.dtype), kept)
    return torch.slice_scatter(y, kept, dim=-2, step=every)
