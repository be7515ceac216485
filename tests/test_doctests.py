"""Every example in a docstring runs.

`pytest --doctest-modules` would import `pipelines/` and `eval/` a second time under their bare
names, with a second copy of each class; here every module is imported by the name it is used by.
"""

import doctest
import importlib

import pytest

from tests.modules import MODULES

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name), optionflags=FLAGS).failed == 0
