"""What depends on the timestep in a layer: scales of its input, a table of outputs, a correction.

| of a layer       | looked up by          | what for                                            |
|------------------|-----------------------|-----------------------------------------------------|
| input scales     | the nearest timestep  | static inputs whose range drifts over the steps     |
| stored outputs   | the very timestep     | layers that see nothing else; others are computed   |
| output gain      | the nearest timestep  | mean and slope of the error of the whole denoiser   |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from dq.nn.steps import Steps
from dq.plan import LayerSpec
from dq.scales import Scales
from dq.spec import Granularity, TensorSpec

__all__ = ["by_group", "corrected", "scales_now", "spread_rows", "stepwise", "tabled"]


class _Layer(Protocol):
    """What simulated and packed layers have in common here."""

    spec: LayerSpec
    steps: Steps | None
    table: Tensor | None
    output_affine: Tensor | None
    axis: int


def stepwise(layer: _Layer, x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the output of a layer at the timestep of the call.

    Args:
        layer: Whose table and correction are looked at, as far as it has them yet.
        x: Its input.
        product: Computes its output.
    """
    if layer.steps is None:
        return product(x)
    if layer.table is not None:
        return tabled(x, lambda: product(x), layer.steps, layer.spec.tabled, layer.table)
    y, groups = product(x), layer.spec.output_groups
    if layer.output_affine is None:
        return y
    return corrected(y, layer.steps, groups, layer.output_affine, layer.axis)


def spread_rows(index: Tensor, rows: int) -> Tensor:
    """Return an entry for each of `rows` rows, which follow each other image by image.

    Args:
        index: `(B,)`, one an image, or `(1,)` for all of them.
        rows: A multiple of B.
    """
    return index.expand(rows) if len(index) == 1 else index.repeat_interleave(rows // len(index))


def scales_now(
    scales: Scales, spec: TensorSpec, steps: Steps, rows: int
) -> tuple[Scales, TensorSpec]:
    """Return the scales of a static input at the timestep of the call.

    Args:
        scales: `(S, g)`, a row a step group.
        spec: With step groups.
        steps: Knows the timestep.
        rows: Of the matrix that is to be quantized.

    Returns:
        Scales `(1, g)`, or `(rows, g)` where rows are at different timesteps, and the spec that
        they are for.
    """
    index = steps.nearest(spec.step_groups)
    if isinstance(index, int):
        return scales.rows(slice(index, index + 1)), spec
    every = spread_rows(index, rows)
    now = Scales(*(x if x is None else x[every] for x in scales))  # type: ignore[arg-type]
    if spec.granularity.kind == "tensor":
        spec = dataclasses.replace(spec, granularity=Granularity("token"))
    return now, spec


def by_group(x: Tensor, index: Tensor, groups: int, run: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Return what `run(rows, group)` makes of the rows of each step group, in their order.

    Args:
        x: `(R, ...)`.
        index: `(R,)` int64, the group of each row.
        groups: How many there are.
        run: Keeps the number of rows.
    """
    if torch.compiler.is_compiling():  # the groups of rows are not known: every group does all
        every = torch.stack([run(x, group) for group in range(groups)])
        return every[index, torch.arange(len(index), device=index.device)]
    y: Tensor | None = None
    for group in index.unique().tolist():
        mine = index == group
        part = run(x[mine], group)
        if y is None:
            y = part.new_empty(len(x), *part.shape[1:])
        y[mine] = part
    assert y is not None  # there is at least one row
    return y


def tabled(
    x: Tensor, compute: Callable[[], Tensor], steps: Steps, times: tuple[float, ...], table: Tensor
) -> Tensor:
    """Return the output of a layer that sees nothing but the timestep.

    Args:
        x: Its input, `(B, K)`.
        compute: Returns its output `(B, N)`; called only where the table has none, and while a
            graph is traced, where values must not decide.
        steps: Knows the timestep.
        times: T timesteps.
        table: `(T, N)` float32, the outputs at these.
    """
    found = steps.exactly(times)
    if found.whole is False:
        return compute()
    known = table[found.row].to(x.dtype)
    if found.whole:
        return known.expand(len(x), -1) if len(known) == 1 else known
    return torch.where(found.hit.unsqueeze(-1), known, compute())


def corrected(
    y: Tensor, steps: Steps, groups: tuple[float, ...], affine: Tensor, axis: int
) -> Tensor:
    """Return an output scaled and shifted as its step group asks for, in its dtype.

    Args:
        y: `(B, ..., N)` or `(B, N, ...)`.
        steps: Knows the timestep.
        groups: G timesteps.
        affine: `(G, 2, N)` float32, scale and shift.
        axis: Of the channels N, -1 or 1.
    """
    index = steps.nearest(groups)
    rows = slice(index, index + 1) if isinstance(index, int) else spread_rows(index, len(y))
    mine = affine[rows]
    between = [1] * (y.dim() - 2)
    shape = (len(mine), *between, -1) if axis == -1 else (len(mine), -1, *between)
    gain, shift = (part.reshape(shape) for part in mine.unbind(1))
    return (y.float() * gain + shift).to(y.dtype)
