"""How oneDNN lays out the weights of a product, found by asking it.

Its layouts are blocked, and chosen for shapes and processors; none is documented as stable. But in
each, where a weight lies is an offset of its row plus one of its column, and behind the weights may
follow minus the sum of every row, for inputs whose zero has a code. Both are read off what oneDNN
makes of numbered weights. Knowing them, weights that are stored in few bits can be expanded right
into place, again and again, in scratch memory that all layers of a shape share.

A layout is believed only if it reproduces, byte by byte, what oneDNN makes of random weights.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from threading import Lock
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from dq.kernels.kernel import Arguments
from dq.kernels.native import calls

__all__ = ["Layout", "layout_of", "scratch_bytes"]

Pack = Callable[[Tensor], Tensor]

_DIGIT = 7  # bits of a weight's number that one int8 weight can carry


@dataclass(frozen=True, eq=False)
class Layout:
    """The layout of one product's weights, and memory for them.

    Attributes:
        row_offsets: `(N,)` int32, bytes.
        column_offsets: `(K,)` int32, bytes.
        sums: Byte where minus the sums of rows begin, or None.
        scratch: The weights, in oneDNN's own tensor.
        lock: To be held from `expand` until the scratch has been read.
    """

    row_offsets: Tensor
    column_offsets: Tensor
    sums: int | None
    scratch: Tensor
    lock: Lock = field(default_factory=Lock)

    def expand(self, a: Arguments, first: int) -> Tensor:
        """Return the scratch tensor, filled with the columns of a weight from `first` on."""
        address = int(torch.ops.mkldnn.data_ptr(self.scratch))
        sums = 0 if self.sums is None else address + self.sums
        calls.expand(a, first, self.row_offsets, self.column_offsets, address, sums)
        return self.scratch


# A layout lives as long as a weight that was prepared for it.
_layouts: WeakValueDictionary[Hashable, Layout] = WeakValueDictionary()
_refused: set[Hashable] = set()


def layout_of(key: Hashable, shape: tuple[int, ...], pack: Pack) -> Layout | None:
    """Return a layout, asking oneDNN when it is needed for the first time.

    Args:
        key: Of all that the layout depends on.
        shape: Of the weights, `(N, ...)`.
        pack: Gives int8 weights of that shape to oneDNN.

    Returns:
        None if it does not have the form that is described above.
    """
    found = _layouts.get(key)
    if found is None and key not in _refused:
        found = _learn(shape, pack)
        if found is None:
            _refused.add(key)
        else:
            _layouts[key] = found
    return found


def scratch_bytes() -> int:
    """Return the bytes of all scratch memory."""
    return sum(_bytes(each.scratch) for each in list(_layouts.values()))


def _bytes(packed: Tensor) -> int:
    return int(torch.ops.mkldnn._nbytes(packed))


def _memory(packed: Tensor) -> Tensor:
    """Return a copy of the bytes of oneDNN's tensor."""
    address = int(torch.ops.mkldnn.data_ptr(packed))
    return torch.frombuffer(
        (ctypes.c_int8 * _bytes(packed)).from_address(address), dtype=torch.int8
    ).clone()


def _learn(shape: tuple[int, ...], pack: Pack) -> Layout | None:
    rows, count = shape[0], torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(0)
    sample = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
    seen = _memory(pack(sample))
    sums = _find_sums(seen, sample.flatten(1).sum(1, dtype=torch.int32))
    offsets = _find_weights(shape, pack, sums)
    if offsets is None:
        return None
    by_column = offsets[0] - offsets[0, 0]
    by_row = offsets[:, 0]
    if not torch.equal(by_row[:, None] + by_column, offsets):
        return None
    scratch = pack(torch.zeros(shape, dtype=torch.int8))
    found = Layout(by_row.int(), by_column.int(), sums, scratch)
    codes = (sample.view(torch.uint8) ^ 128).flatten(1)
    stored = Arguments(
        codes, torch.ones(rows), None, None, 8, count // rows, 0, 0, 8, [], keep=False
    )
    return found if torch.equal(_memory(found.expand(stored, 0)), seen) else None


def _find_sums(seen: Tensor, sums: Tensor) -> int | None:
    """Return the byte where minus the sums of rows follow each other, or None."""
    words = seen[: len(seen) // 4 * 4].view(torch.int32)
    starts = (words == -sums[0]).nonzero().flatten().flip(0)  # behind the weights, hence last
    for start in starts.tolist():
        if torch.equal(words[start : start + len(sums)], -sums):
            return 4 * int(start)
    return None


def _find_weights(shape: tuple[int, ...], pack: Pack, sums: int | None) -> Tensor | None:
    """Return the byte of each weight, `(N, K)` int64, or None if not all were found."""
    count = torch.Size(shape).numel()
    numbers = torch.arange(1, count + 1).view(shape)
    code: Tensor | None = None
    for digit in range(0, int(count).bit_length(), _DIGIT):
        seen = _memory(pack(((numbers >> digit) & 127).to(torch.int8))).long()
        if sums is not None:
            seen[sums : sums + 4 * shape[0]] = 0
        code = seen << digit if code is None else code + (seen << digit)
    assert code is not None  # there is at least one weight
    places = code.nonzero().flatten()
    found = code[places] - 1
    if len(places) != count or int(found.min()) < 0 or int(found.max()) >= count:
        return None
    offsets = torch.full((count,), -1)
    offsets[found] = places
    return offsets.view(shape[0], -1) if int(offsets.min()) >= 0 else None
