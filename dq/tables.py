"""Tables of text for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

__all__ = ["aligned", "cells"]


def aligned(rows: Iterable[Sequence[str]], right: bool = False) -> list[str]:
    """Return a line a row, columns padded to their widest cell and two spaces apart.

    Args:
        rows: Of equally many cells.
        right: Whether all columns but the first stand at the right, as numbers do.

    Example:
        >>> aligned([("", "ms"), ("w8a8", "9.5")], right=True)
        ['       ms', 'w8a8  9.5']
    """
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    pads = [str.rjust if right and index else str.ljust for index in range(len(widths))]
    return [
        "  ".join(pad(c, w) for pad, c, w in zip(pads, row, widths, strict=True)) for row in table
    ]


def cells(records: Sequence[Mapping[str, object]]) -> list[list[str]]:
    """Return rows of text for records: their keys first, then a row each.

    Args:
        records: Columns are the keys of all of them; where one lacks a key, its cell is empty.
    """
    heads = list(dict.fromkeys(key for record in records for key in record))
    if not heads:
        return []
    return [heads, *([str(record.get(key, "")) for key in heads] for record in records)]
