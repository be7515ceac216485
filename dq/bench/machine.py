"""Measure what runs fastest at which size on this machine: `dq measure`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch.nn import functional as F

from dq.bench.report import Machine
from dq.bench.timing import interleave, threads_set
from dq.kernels import Arguments, Site, choose
from dq.kernels.attention import WAYS, available
from dq.kernels.measured import Entry, Shape, Table
from dq.progress import track

__all__ = ["ATTENTION", "LINEAR", "measure"]

Runs = dict[str, Callable[[], object]]

# Queries, keys, features of a head.
ATTENTION = tuple(
    Shape(queries, keys, depth)
    for queries, keys in ((64, 64), (256, 77), (256, 256), (1024, 77), (1024, 1024), (4096, 4096))
    for depth in (16, 40, 64, 128)
)
# Rows of the input, K, N.
LINEAR = tuple(
    Shape(rows, width, width) for rows in (2, 32, 512) for width in (16, 32, 64, 128, 256, 512)
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
    q, k, v = (
        torch.randn(1, tokens, _HEADS * shape.third)
        .bfloat16()
        .unflatten(2, (_HEADS, shape.third))
        .transpose(1, 2)
        for tokens in (shape.first, shape.second, shape.second)
    )
    scale = shape.third**-0.5
    return {name: partial(WAYS[name], q, k, v, scale) for name in available()}


def _linear(shape: Shape) -> Runs:
    rows, columns, features = shape
    x, weight = torch.randn(rows, columns).bfloat16(), torch.randn(features, columns).bfloat16()
    bias = torch.randn(features).bfloat16()
    static = Arguments(
        weight=torch.randint(256, (features, columns), dtype=torch.uint8),
        scale=torch.full((features,), 0.01),
        bias=bias,
        input_affine=torch.tensor([[0.03, 128.0]]),
        weight_bits=8,
        columns=columns,
        multiplier_bits=0,
        groups=0,
        input_bits=8,
        segments=[],
    )
    kernel = choose(Site("linear", "cpu", features, columns, "int8", "int8"))
    assert kernel is not None  # integers are served on every CPU
    # Each has a weight of its own: what kernels keep belongs to a weight.
    dynamic = static._replace(weight=static.weight.clone(), input_affine=None)
    fresh = static._replace(weight=static.weight.clone(), keep=False)
    return {
        "bf16": lambda: F.linear(x, weight, bias),
        "int8": lambda: kernel.run(x, static),
        "int8, dynamic": lambda: kernel.run(x, dynamic),
        "int8, expanded at each call": lambda: kernel.run(x, fresh),
    }
