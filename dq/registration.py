"""Put dq into diffusers' mappings, at once or as soon as diffusers loads them.

Importing `diffusers.quantizers.auto` takes a third of a second, which `import dq` must not cost
those who only import it; a finder on `sys.meta_path` therefore waits for that import.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["register"]


_HOSTS = ("diffusers.quantizers.auto", "transformers.quantizers.auto")


def register() -> None:
    """Make `quant_method: dq` known to diffusers, and to transformers, whose table it consults."""
    for name in _HOSTS:
        if name in sys.modules:
            _enter()
        elif not any(isinstance(f, _WhenImported) and f.name == name for f in sys.meta_path):
            sys.meta_path.insert(0, _WhenImported(name))


def _enter() -> None:
    """Import the integration, which enters itself; again if it was there before the host was."""
    module = importlib.import_module("dq.integration")
    if hasattr(module, "enter"):  # else it is being imported just now, and will enter at its end
        module.enter()


class _WhenImported(MetaPathFinder):
    """Enter dq once the module `name` has been imported, then step aside."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenEnter(spec.loader)
        return spec


class _ThenEnter(Loader):
    """A loader that does one thing more."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _enter()
