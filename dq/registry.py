"""Named extension points: formats, observers, methods, recipes, families, kernels."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from dq.errors import DQError, unknown

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Generic[T]):
    """A dictionary that files fill themselves, by name.

    Args:
        kind: What the entries are, for error messages, e.g. `"method"`.
        home: Package or module that holds the built-in entries. It is imported on the first look-up
            (every module of a package), and import errors are let through. Third parties add
            theirs through the entry-point group `dq`: each entry point is imported likewise.

    Example:
        >>> colours: Registry[int] = Registry("colour")
        >>> colours.add("red", 1)
        1
        >>> colours["red"], colours.names()
        (1, ('red',))
        >>> colours["rod"]
        Traceback (most recent call last):
        ...
        dq.errors.DQError: unknown colour 'rod'. Did you mean 'red'? Known: red.
    """

    def __init__(self, kind: str, home: str | None = None) -> None:
        self.kind = kind
        self._home = home
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> T:
        """Add `entry` under `name`.

        Raises:
            DQError: If the name is taken.
        """
        if name in self._entries:
            raise DQError(f"{self.kind} {name!r} is registered twice; choose another name")
        self._entries[name] = entry
        return entry

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that adds what it decorates under `name`."""
        return lambda entry: self.add(name, entry)

    def names(self) -> tuple[str, ...]:
        """Return all names, in the order in which they were added."""
        self._load()
        return tuple(self._entries)

    def items(self) -> tuple[tuple[str, T], ...]:
        """Return all (name, entry) pairs, in the order in which they were added."""
        self._load()
        return tuple(self._entries.items())

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._entries

    def __getitem__(self, name: str) -> T:
        self._load()
        if name not in self._entries:
            raise unknown(self.kind, name, self._entries)
        return self._entries[name]

    def _load(self) -> None:
        if self._home is None:
            return
        home, self._home = self._home, None
        complete = dict(self._entries)
        try:
            package = importlib.import_module(home)
            for info in pkgutil.iter_modules(getattr(package, "__path__", [])):
                importlib.import_module(f"{home}.{info.name}")
                complete = dict(self._entries)
            for point in entry_points(group="dq"):
                point.load()
                complete = dict(self._entries)
        except BaseException:
            # A failed import must fail again in the same words: neither look like an empty
            # registry, nor leave half a module's entries, "registered twice" the next time.
            self._entries, self._home = complete, home
            raise
