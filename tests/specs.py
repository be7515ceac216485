"""Specs to sweep over, made from the registries: a new format or observer joins by itself."""

from __future__ import annotations

from collections.abc import Iterator

from dq.errors import DQError
from dq.formats import IntFormat, formats
from dq.observers import observers
from dq.plan import LayerSpec
from dq.spec import Granularity, TensorSpec

__all__ = ["GROUP", "INPUTS", "WEIGHTS", "layer_specs"]

GROUP = 8  # divides the columns of every tensor that is tested


def _weights() -> Iterator[TensorSpec]:
    for name, grid in formats.items():
        if grid.low > 0:  # for scales only
            continue
        for granularity in (Granularity("channel"), Granularity("group", GROUP)):
            yield TensorSpec(name, granularity)
            if isinstance(grid, IntFormat):
                yield TensorSpec(name, granularity, symmetric=False)
    for granularity in (Granularity("channel"), Granularity("group", GROUP)):
        for bases in (1, 2, 3):
            yield TensorSpec("binary", granularity, bases=bases)
            yield TensorSpec("binary", granularity, symmetric=False, bases=bases)
    for name in ("binary", "ternary"):
        yield TensorSpec(name, Granularity("group", GROUP), scale_format="uint6")
    for bits in range(2, 7):
        grouped = Granularity("group", GROUP)
        yield TensorSpec(f"int{bits}", grouped, scale_format=f"uint{8 - bits}")
    for name in observers.names():
        yield TensorSpec("int4", Granularity("group", GROUP), observer=name)
    yield from _float_blocks(dynamic=False)


def _float_blocks(dynamic: bool) -> Iterator[TensorSpec]:
    """Blocks with scales of a few bits: MX and NVFP4, found in every way there is."""
    grouped = Granularity("group", GROUP)
    for rule in ("floor", "ceil", "even", "rceil", "search"):
        for name in ("e2m1", "e4m3"):
            yield TensorSpec(name, grouped, True, dynamic, "absmax", "e8m0", rule)
    for rule in ("nearest", "four-six", "search"):
        yield TensorSpec("e2m1", grouped, True, dynamic, "absmax", "e4m3", rule)
    yield TensorSpec("int4", grouped, True, dynamic, "absmax", "e8m0")


def _inputs() -> Iterator[TensorSpec]:
    for name, grid in formats.items():
        if grid.low > 0 or grid.bits == 1:
            continue
        yield TensorSpec(name, Granularity("tensor"))
        if isinstance(grid, IntFormat):
            yield TensorSpec(name, Granularity("tensor"), symmetric=False)
        if grid.low < 0:
            yield TensorSpec(name, Granularity("token"), dynamic=True)
    for name in observers.names():
        yield TensorSpec("int8", Granularity("tensor"), symmetric=False, observer=name)
    yield TensorSpec("int4", Granularity("group", GROUP), dynamic=True)
    yield from _float_blocks(dynamic=True)


WEIGHTS = tuple(dict.fromkeys(_weights()))
"""Every way to quantize a weight whose columns are a multiple of `GROUP`."""

INPUTS = tuple(dict.fromkeys(_inputs()))
"""Every way to quantize an input, dynamic ones included."""


def layer_specs(splits: tuple[int, ...] = ()) -> tuple[LayerSpec, ...]:
    """Return each weight spec alone, then each input spec beside a few kinds of weight."""
    made = [LayerSpec(weight) for weight in WEIGHTS]
    grouped = Granularity("group", GROUP)
    for weight in (
        TensorSpec("int8", Granularity("channel")),
        TensorSpec("int4", grouped, scale_format="uint4"),
        TensorSpec("e4m3", Granularity("channel")),
        TensorSpec("e2m1", grouped),
        TensorSpec("binary", Granularity("channel")),
        TensorSpec("binary", grouped, bases=2),
    ):
        for low in INPUTS:
            try:
                made.append(LayerSpec(weight, low, () if low.dynamic else splits))
            except DQError as error:  # the spec says itself what does not go together
                assert "dynamic" in str(error)
    return tuple(made)
