"""Every example in a docstring runs.

`pytest --doctest-modules` would import `pipelines/` and `eval/` a second time under their bare
names, with a second copy of each class; here every module is imported by the name it is used by.
"""

import doctest
import importlib
import pkgutil
from collections.abc import Iterator

import pytest

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def find_modules() -> Iterator[str]:
    for root in ("dq", "dq.pipelines", "dq.eval"):
        yield root
        path = importlib.import_module(root).__path__
        yield from (info.name for info in pkgutil.walk_packages(path, f"{root}.", onerror=_fail))


def _fail(name: str) -> None:
    importlib.import_module(name)  # walk_packages swallows import errors: raise it again


@pytest.mark.parametrize(
    "name", sorted(name for name in find_modules() if not name.endswith("__main__"))
)
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name), optionflags=FLAGS).failed == 0
