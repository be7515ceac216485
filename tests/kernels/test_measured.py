"""Choices by size come from a table: the machine's own, or the one that is shipped."""

from pathlib import Path

import pytest

from dq.bench.machine import measure
from dq.errors import DQError
from dq.kernels import measured
from dq.kernels.attention import WAYS
from dq.kernels.measured import Entry, Table, fastest, table

TABLE = Table(
    "a machine",
    {
        "attention": (Entry((64, 64, 64), {"sdpa": 1.0, "native": 0.5}),),
        "linear": (
            Entry((2, 1024), {"bf16": 1.0, "rows": 2.0, "oneDNN": 3.0}),
            Entry((512, 65536), {"bf16": 9.0, "rows": 8.0, "oneDNN": 1.0}),
        ),
    },
)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """An empty cache, and no memory of the table that was read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    table.cache_clear()
    fastest.cache_clear()
    yield tmp_path
    table.cache_clear()
    fastest.cache_clear()


def test_the_shipped_table_knows_all_competitors(own: Path) -> None:
    shipped = table()
    assert "torch" in shipped.machine
    for entry in shipped.entries["attention"]:
        assert set(entry.milliseconds) == set(WAYS)
    for entry in shipped.entries["linear"]:
        assert set(entry.milliseconds) == {
            "bf16",
            "rows",
            "oneDNN",
            "rows, 4 bits",
            "oneDNN, 4 bits",
        }


def test_the_machines_own_table_goes_first(own: Path) -> None:
    file = TABLE.write()
    assert own in file.parents
    assert table() == TABLE
    assert fastest("linear", (3, 900), ("rows", "oneDNN")) == "rows"
    assert fastest("linear", (300, 90000), ("rows", "oneDNN")) == "oneDNN"
    assert fastest("attention", (8, 8, 8), ("sdpa",)) == "sdpa"
    assert fastest("attention", (8, 8, 8), ("unknown", "sdpa")) == "sdpa"


def test_it_says_where_int8_loses() -> None:
    assert "by rows of the input: 2 rows: 32\n" in TABLE.summary()
    assert "a machine" in TABLE.summary()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"machine": "x", "linear": [{"shape": 3}]}'])
def test_a_damaged_table_is_named(own: Path, text: str) -> None:
    file = TABLE.write()
    file.write_text(text)
    with pytest.raises(DQError, match=r"measured\.json is not a table .* run `dq measure`"):
        table()


def test_measuring() -> None:
    found = measure(repeats=1, attention=[(16, 16, 16)], linear=[(4, 1024), (40, 1024)])
    assert [entry.shape for entry in found.entries["linear"]] == [(4, 1024), (40, 1024)]
    assert all(t > 0 for e in found.entries["attention"] for t in e.milliseconds.values())
    assert {"bf16", "oneDNN"} <= set(found.entries["linear"][0].milliseconds)
    assert measured.Table is type(found)
