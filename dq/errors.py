"""The one exception of the library, and the wrapper that says where it happened."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

__all__ = ["DQError", "check_known", "inside", "unknown"]

_MOST_NAMES = 24


class DQError(Exception):
    """Something a user can cause and can mend.

    The message says what happened, where (file or layer), what is allowed and what to do.
    """


def unknown(kind: str, name: object, known: Iterable[str]) -> DQError:
    """Build the error for a name that is not known.

    Args:
        kind: What was looked up, e.g. `"recipe"`.
        name: The name that was asked for.
        known: All valid names.

    Returns:
        The error, to be raised by the caller; it names the nearest valid name, then all of them or,
        where they are many, some and their number.
    """
    names = sorted(map(str, known))  # members of an enumeration show their value
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    shown = ", ".join(names[:_MOST_NAMES]) or "none"
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return DQError(f"unknown {kind} {name!r}.{hint} Known: {shown}{more}.")


def check_known(kind: str, names: Iterable[object], known: Iterable[str]) -> None:
    """Refuse the first of some names that is not known.

    Args:
        kind: What is looked up; see `unknown`.
        names: That were asked for.
        known: All valid names.

    Raises:
        DQError: If one is not among them.
    """
    valid = tuple(known)
    for name in names:
        if name not in valid:
            raise unknown(kind, name, valid)


@contextmanager
def inside(place: str) -> Iterator[None]:
    """Put `place` (a file, a layer, a key of a recipe) in front of any `DQError` raised inside.

    Example:
        >>> with inside("conv_in (Conv2d 4->64)"):
        ...     raise DQError("group size 96 does not divide 36")
        Traceback (most recent call last):
        ...
        dq.errors.DQError: conv_in (Conv2d 4->64): group size 96 does not divide 36
    """
    try:
        yield
    except DQError as error:
        raise DQError(f"{place}: {error}") from error.__cause__
