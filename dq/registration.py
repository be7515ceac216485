"""Put dq into diffusers' mappings, at once or as soon as diffusers loads them.

Importing `diffusers.quantizers.auto` takes a third of a second, which `import dq` must not cost
those who only import it; a finder on `sys.meta_path` therefore waits for that import.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from dq.errors import DQError

__all__ = ["register"]


def register() -> None:
    """Make `quant_method: dq` known to diffusers, and to transformers, whose table it consults."""
    for name, action in _ACTIONS.items():
        if name in sys.modules:
            action(sys.modules[name])
        elif not any(isinstance(f, _WhenImported) and f.name == name for f in sys.meta_path):
            sys.meta_path.insert(0, _WhenImported(name, action))


def _into_diffusers(module: ModuleType) -> None:
    from dq.integration import DQConfig, DQQuantizer

    _put(module.AUTO_QUANTIZER_MAPPING, DQQuantizer)
    _put(module.AUTO_QUANTIZATION_CONFIG_MAPPING, DQConfig)


def _into_transformers(module: ModuleType) -> None:
    from dq.integration import DQConfig

    # PipelineQuantizationConfig(quant_backend="dq") looks its config class up here too.
    _put(module.AUTO_QUANTIZATION_CONFIG_MAPPING, DQConfig)


def _put(mapping: dict[str, type], entry: type) -> None:
    known = mapping.get("dq", entry)
    if (known.__module__, known.__qualname__) != (entry.__module__, entry.__qualname__):
        raise DQError(f"quantization method 'dq' is taken by {known}; uninstall the other package")
    mapping["dq"] = entry


_ACTIONS: dict[str, Callable[[ModuleType], None]] = {
    "diffusers.quantizers.auto": _into_diffusers,
    "transformers.quantizers.auto": _into_transformers,
}


class _WhenImported(MetaPathFinder):
    """Run `action` on the module `name` once it has been imported, then step aside."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.action = action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, self.action)
        return spec


class _Then(Loader):
    """A loader that does one thing more."""

    def __init__(self, loader: Loader, action: Callable[[ModuleType], None]) -> None:
        self.loader = loader
        self.action = action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.action(module)
