"""Measure what runs fastest at which size on this machine: `dq measure`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from dq.bench.report import Machine
from dq.bench.timing import interleave, threads_set
from dq.kernels import Arguments, onednn
from dq.kernels.attention import WAYS, available
from dq.kernels.inputs import affine_of
from dq.kernels.measured import Entry, Shape, Table
from dq.kernels.native import calls, library
from dq.packing import packed_length
from dq.progress import track

__all__ = ["ATTENTION", "LINEAR", "measure"]

Runs = dict[str, Callable[[], object]]

# Queries, keys, features of a head.
ATTENTION: tuple[Shape, ...] = tuple(
    (queries, keys, depth)
    for queries, keys in ((64, 64), (256, 77), (256, 256), (1024, 77), (1024, 1024), (4096, 4096))
    for depth in (16, 40, 64, 128)
)
# Rows of the input, and weights of a square layer.
LINEAR: tuple[Shape, ...] = tuple(
    (rows, width * width)
    for rows in (2, 8, 16, 32, 64, 128, 256, 512, 1024)
    for width in (32, 64, 128, 256, 512, 1024)
)
_HEADS = 4


@torch.no_grad()
def measure(
    threads: int = 1,
    repeats: int = 5,
    attention: Iterable[Shape] = ATTENTION,
    linear: Iterable[Shape] = LINEAR,
) -> Table:
    """Run all competitors at some sizes.

    Args:
        threads: Of torch; restored afterwards.
        repeats: Rounds, of which medians are taken.
        attention: Sizes of attention.
        linear: Sizes of layers.
    """
    machine = Machine.here(threads)
    with threads_set(threads):
        return Table(
            f"{machine.cpu}, {threads} threads, torch {machine.torch}, {machine.date}",
            {
                "attention": _entries(attention, _attention, repeats, "measuring attention"),
                "linear": _entries(linear, _linear, repeats, "measuring layers"),
            },
        )


def _entries(
    shapes: Iterable[Shape], runs: Callable[[Shape], Runs], repeats: int, title: str
) -> tuple[Entry, ...]:
    made = []
    for shape in track(list(shapes), title):
        times = interleave(runs(shape), repeats)
        made.append(Entry(shape, {n: round(t.milliseconds, 4) for n, t in times.items()}))
    return tuple(made)


def _attention(shape: Shape) -> Runs:
    queries, keys, depth = shape
    q, k, v = (
        torch.randn(1, tokens, _HEADS * depth).bfloat16().unflatten(2, (_HEADS, -1)).transpose(1, 2)
        for tokens in (queries, keys, keys)
    )
    scale = depth**-0.5
    return {name: partial(WAYS[name], q, k, v, scale) for name in available()}


def _linear(shape: Shape) -> Runs:
    rows, width = shape[0], math.isqrt(shape[1])
    x, weight = torch.randn(rows, width).bfloat16(), torch.randn(width, width).bfloat16()
    bias = torch.randn(width).bfloat16()
    runs: Runs = {"bf16": lambda: F.linear(x, weight, bias)}
    for bits, suffix in ((8, ""), (4, ", 4 bits")):
        for way in ("rows", "oneDNN"):
            a = _layer(width, bias, bits)
            if way == "oneDNN":
                runs[way + suffix] = partial(onednn.product, x, a)
            elif library() is not None:
                affine, zeros = affine_of(a)[0], bias.float()
                runs[way + suffix] = partial(calls.linear_rows, x, a, affine, zeros)
    return runs


def _layer(width: int, bias: Tensor, bits: int) -> Arguments:
    """Return a square layer with random codes; shorter ones than 8 bits in groups of 32."""
    groups = 0 if bits == 8 else width // 32
    length = packed_length(width, bits) + (packed_length(groups, 8 - bits) if groups else 0)
    return Arguments(
        weight=torch.randint(256, (width, length), dtype=torch.uint8),
        scale=torch.full((width,), 0.01),
        bias=bias,
        input_affine=torch.tensor([[0.03, 128.0]]),
        weight_bits=bits,
        columns=width,
        multiplier_bits=8 - bits if groups else 0,
        groups=groups,
        input_bits=8,
        segments=[],
        keep=bits == 8,
    )
