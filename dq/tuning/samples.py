"""Captured calls, row by row: a batch for learning mixes images and steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dq.calls import Call, flatten, unflatten
from dq.errors import DQError

__all__ = ["Samples"]


class Samples:
    """Rows of forward calls of a denoiser: one image at one step, with its prompt or without.

    Conditional and unconditional rows of classifier-free guidance are rows like others. Equal
    tensors of consecutive calls, the prompts of a batch at all of its steps, are kept once.

    Args:
        calls: As captured.
        noisy: Name of the argument that says how many rows a call has, the noisy images. Tensors of
            other lengths are the same for all rows, numbers hold for each row of their call.
    """

    def __init__(self, calls: Iterable[Call], noisy: str) -> None:
        self._calls: list[tuple[int, dict[str, Tensor]]] = []
        self._rows: list[tuple[int, int]] = []
        before: dict[str, Tensor] = {}
        for call in calls:
            now = {k: _same(before.get(k), v) for k, v in flatten(call).items()}
            size = len(now[noisy])
            self._rows += [(len(self._calls), row) for row in range(size)]
            self._calls.append((size, now))
            before = now
        if not self._rows:
            raise DQError("there are no captured calls to learn from")

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Sequence[int]) -> Call:
        """Return the arguments of one forward call with some of the rows, in order."""
        picked = [(*self._calls[self._rows[i][0]], self._rows[i][1]) for i in indices]
        _, first, _ = picked[0]
        values = {}
        for key, value in first.items():
            rows = [_row(tensors[key], row, size) for size, tensors, row in picked]
            shared = rows[0] is None
            values[key] = value if shared else torch.stack([r for r in rows if r is not None])
        return unflatten(values)

    def shuffled(self, seed: int) -> list[int]:
        """Return all rows in an order that depends on the seed alone."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(len(self), generator=generator).tolist()


def _same(before: Tensor | None, now: Tensor) -> Tensor:
    return before if before is not None and torch.equal(before, now) else now


def _row(value: Tensor, row: int, size: int) -> Tensor | None:
    """Return what a row has of an argument; None for what all rows share."""
    if value.dim() == 0:
        return value
    if len(value) == size:
        return value[row]
    return value[0] if value.shape == (1,) else None
