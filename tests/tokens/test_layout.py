"""Where tokens go: the image padded to whole blocks, then the text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dq.errors import DQError
from dq.tokens import TokenLayout

layouts = st.builds(
    TokenLayout,
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
    st.integers(0, 9),
    st.booleans(),
)


@given(layouts, st.integers(1, 16))
def test_every_token_has_one_place_and_no_block_is_of_both(layout: TokenLayout, unit: int) -> None:
    table = layout.table("wh", unit)
    assert len(table) % unit == 0
    assert sorted(t for t in table.tolist() if t >= 0) == [*range(layout.tokens)]
    text = range(layout.text) if layout.text_first else range(layout.image, layout.tokens)
    for block in table.view(-1, unit).tolist():
        assert len({token in text for token in block if token >= 0}) == 1


def test_the_image_comes_first_in_the_order_asked_for() -> None:
    found = TokenLayout((2, 2), 1, text_first=True).table("wh", 4)
    assert found.tolist() == [1, 3, 2, 4, 0, -1, -1, -1]
    assert found.dtype == torch.int32


def test_words() -> None:
    assert str(TokenLayout((2, 3))) == "2x3"
    assert str(TokenLayout((4, 2, 3), 5)) == "4x2x3 + 5 text"
    assert str(TokenLayout((2, 3), 5, text_first=True)) == "5 text + 2x3"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"grid": (4,)}, "a grid is"),
        ({"grid": (4, 0)}, "a grid is"),
        ({"grid": (1, 2, 3, 4)}, "a grid is"),
        ({"grid": (4, 4), "text": -1}, "text is a number"),
    ],
)
def test_what_is_no_layout_is_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(DQError, match=text):
        TokenLayout(**settings)
