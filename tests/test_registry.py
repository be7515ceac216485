import sys
from pathlib import Path

import pytest

from dq.errors import DQError
from dq.registry import Registry


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `plugins` with a registry and one entry; forgotten afterwards."""
    folder = tmp_path / "plugins"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from dq.registry import Registry\nthings = Registry('thing', home='plugins')\n"
    )
    (folder / "one.py").write_text("from plugins import things\nthings.add('one', 1)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [n for n in sys.modules if n.split(".")[0] == "plugins"]:
        del sys.modules[name]


def test_names_come_in_the_order_in_which_they_were_added() -> None:
    registry: Registry[int] = Registry("number")
    registry.add("two", 2)
    registry.add("one", 1)
    assert registry.names() == ("two", "one")
    assert registry.items() == (("two", 2), ("one", 1))
    assert "one" in registry
    assert "three" not in registry


def test_a_name_is_taken_once() -> None:
    registry: Registry[int] = Registry("number")
    registry.add("one", 1)
    with pytest.raises(DQError, match="number 'one' is registered twice"):
        registry.add("one", 2)
    assert registry["one"] == 1


def test_register_returns_what_it_decorates() -> None:
    registry: Registry[type] = Registry("class")

    @registry.register("a")
    class A:
        pass

    assert registry["a"] is A


def test_an_unknown_name_lists_the_known_ones() -> None:
    registry: Registry[int] = Registry("number")
    registry.add("one", 1)
    with pytest.raises(DQError, match=r"unknown number 'onne'. Did you mean 'one'\? Known: one"):
        registry["onne"]


@pytest.mark.parametrize(
    "look", [lambda r: r.names(), lambda r: r.items(), lambda r: r["one"], lambda r: "one" in r]
)
def test_every_look_imports_the_home_first(package: Path, look) -> None:
    from plugins import things

    assert "plugins.one" not in sys.modules
    assert look(things)
    assert "plugins.one" in sys.modules


def test_a_failed_import_is_seen_every_time(package: Path) -> None:
    from plugins import things

    (package / "two.py").write_text("raise ImportError('no such library')\n")
    for _ in range(2):
        with pytest.raises(ImportError, match="no such library"):
            things.names()
    (package / "two.py").write_text("from plugins import things\nthings.add('two', 2)\n")
    assert set(things.names()) == {"one", "two"}


def test_half_a_module_leaves_no_entries(package: Path) -> None:
    from plugins import things

    (package / "two.py").write_text(
        "from plugins import things\nthings.add('two', 2)\nraise ImportError('late')\n"
    )
    for _ in range(2):
        with pytest.raises(ImportError, match="late"):
            things.names()
