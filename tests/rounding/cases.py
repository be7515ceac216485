"""Weights, and the second moments of inputs whose channels depend on each other."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from dq.distance import sqnr
from dq.presets import weight_preset
from dq.quantize import choose_scales, dequantize
from dq.scales import Scales
from dq.spec import Granularity, TensorSpec
from tests.specs import WEIGHTS

__all__ = [
    "COLUMNS",
    "EVERY",
    "NARROW",
    "ROWS",
    "SUMS",
    "each",
    "gain",
    "inputs",
    "moment_of",
    "narrow",
    "scaled",
    "weight",
]

ROWS, COLUMNS = 48, 160  # more columns than GPTQ takes at once

NARROW = {
    name: weight_preset(name)
    for name in ("int4-g32", "int4-g0", "int3", "e2m1", "e2m1-g32", "nf4-g32", "nvfp4", "mxfp4")
} | {
    "uint4": TensorSpec("uint4", Granularity("group", 32), symmetric=False, observer="mse"),
    "uint4 by channel": TensorSpec("uint4", Granularity("channel"), symmetric=False),
}
"""Weights of 3 and 4 bits: integers, floats and blocks, with and without groups and zeros."""

_SIGNED = [spec for spec in WEIGHTS if spec.grid.low < 0 or not spec.symmetric]

EVERY = tuple(spec for spec in _SIGNED if spec.bases == 1)
"""Whatever can be a weight, which has two signs, and has a grid that blocks share."""

SUMS = tuple(spec for spec in _SIGNED if spec.bases > 1)
"""Sums of several bases."""

each = pytest.mark.parametrize("spec", EVERY, ids=str)
narrow = pytest.mark.parametrize("spec", NARROW.values(), ids=[*NARROW])


def weight(rows: int = ROWS, seed: int = 0) -> Tensor:
    """Return a weight `(N, K)` whose rows differ in size by a factor of about ten."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 0.05 * torch.exp(0.7 * torch.randn(rows, 1, generator=generator))
    return torch.randn(rows, COLUMNS, generator=generator) * sizes


@cache
def _mixture() -> Tensor:
    """A few directions hold most of the energy, as in the inputs of real layers."""
    strength = torch.exp(-torch.arange(COLUMNS) / 16.0)
    mixture = torch.randn(COLUMNS, COLUMNS, generator=torch.Generator().manual_seed(7))
    return mixture * strength.unsqueeze(1) + 0.05 * torch.eye(COLUMNS)


@cache
def inputs(seed: int = 1, rows: int = 2048) -> Tensor:
    """Return correlated Gaussian inputs `(R, K)`; equal values at every call."""
    noise = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed))
    return noise @ _mixture()


def moment_of(x: Tensor) -> Tensor:
    """Return E[x x^T]."""
    return x.T @ x / len(x)


def scaled(spec: TensorSpec, w: Tensor | None = None) -> tuple[Tensor, Scales]:
    """Return a weight and its scales."""
    w = weight() if w is None else w
    return w, choose_scales(w, spec)


def gain(codes: Tensor, nearest: Tensor, w: Tensor, scales: Scales, spec: TensorSpec) -> float:
    """Return how much better codes are than the nearest ones, dB of the output on fresh inputs."""
    x = inputs(seed=2)
    wanted = x @ w.T
    found = [sqnr(x @ dequantize(c, scales, spec).T, wanted) for c in (codes, nearest)]
    return found[0] - found[1]
