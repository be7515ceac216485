import pytest

from dq.tables import aligned, cells

ROWS = [("layer", "dB", "note"), ("conv_in", "31.5", ""), ("to_k", "9", "kept")]


def test_columns_stand_at_the_left_or_but_the_first_at_the_right() -> None:
    assert aligned(ROWS) == ["layer    dB    note", "conv_in  31.5      ", "to_k     9     kept"]
    right = ["layer      dB  note", "conv_in  31.5      ", "to_k        9  kept"]
    assert aligned(ROWS, right=True) == right
    assert aligned([]) == []


def test_rows_are_of_one_length() -> None:
    with pytest.raises(ValueError, match="zip"):
        aligned([("a", "b"), ("c",)])


def test_records_have_a_cell_for_each_key_of_any() -> None:
    assert cells([{"a": 1, "b": 2.5}, {"c": None, "a": "x"}]) == [
        ["a", "b", "c"],
        ["1", "2.5", ""],
        ["x", "", "None"],
    ]
    assert cells([]) == cells([{}]) == []
