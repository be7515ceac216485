"""The one progress display."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

__all__ = ["track"]

T = TypeVar("T")


def track(
    items: Iterable[T],
    title: str,
    total: int | None = None,
    words: Callable[[], str] = lambda: "",
) -> Iterator[T]:
    """Iterate over `items` with a progress bar on standard error.

    The bar, with rate and time left, appears once the loop has taken a second, and only on a
    terminal.

    Args:
        items: What to iterate over.
        title: Words in front of the bar, e.g. `"calibrating"`.
        total: Number of items where `len(items)` does not tell.
        words: Returns what stands behind the bar, asked after each item.
    """
    bar = tqdm(items, desc=title, total=total, delay=1.0, disable=None, dynamic_ncols=True)
    for item in bar:
        yield item
        if said := words():
            bar.set_postfix_str(said, refresh=False)
