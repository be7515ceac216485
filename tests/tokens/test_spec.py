"""The spec of ordered tokens: sizes, JSON, refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dq.errors import DQError
from dq.tokens import TokenLayout, TokenSpec

SPEC = TokenSpec(TokenLayout((5, 7), 10, True), 3, ("hw", "wh"), (8, 16), (1.0, 500.0))


def test_it_survives_json() -> None:
    assert TokenSpec.from_dict(json.loads(json.dumps(SPEC.to_dict()))) == SPEC


def test_sizes() -> None:
    assert SPEC.unit == 16
    assert SPEC.image_blocks == (6, 3)  # 35 tokens, 48 places
    assert SPEC.blocks == (8, 4)  # and 16 of text
    assert SPEC.mask_shape == (2, 3, 3)  # 18 bits
    assert SPEC.bytes() == 3 + 2 * 3 * 3


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"heads": 0}, "heads is 1 or more"),
        ({"block": (8, 12)}, "divide each other"),
        ({"block": (0, 4)}, "divide each other"),
        ({"orders": ()}, "1 to 256 orders"),
        ({"orders": ("hw", "fhw")}, "unknown order 'fhw'"),
        ({"groups": (2.0, 1.0)}, "ascending"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], text: str) -> None:
    values: dict[str, Any] = {"layout": TokenLayout((4, 4)), "heads": 2, "orders": ("hw",)}
    with pytest.raises(DQError, match=text):
        TokenSpec(**(values | settings))


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(DQError, match="Did you mean 'heads'"):
        TokenSpec.from_dict({**SPEC.to_dict(), "head": 3})
