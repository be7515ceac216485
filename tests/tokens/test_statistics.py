"""What is said of blocks is what is in the maps, however they are cut up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dq.tokens import TokenLayout, statistics
from dq.tokens.statistics import BlockStatistics

ORDERS = ("hw", "wh", "tile2x2")
LAYOUTS = [TokenLayout((4, 6)), TokenLayout((5, 3), 4), TokenLayout((5, 3), 4, text_first=True)]


def maps(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return (q @ k.mT * scale).softmax(-1)


def blocks_of(map: Tensor, layout: TokenLayout, order: str, block: tuple[int, int]) -> Tensor:
    """Return the blocks of maps `(B, H, N, N)`, `(B, H, q, k, queries, keys)`."""
    padded = layout.image + -layout.image % max(block)
    table = layout.table(order, max(block))[:padded].long()
    moved = map[:, :, table][..., table] * ((table >= 0)[:, None] & (table >= 0))
    return moved.unflatten(2, (-1, block[0])).unflatten(4, (-1, block[1])).transpose(3, 4)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("block", [(4, 4), (4, 8), (8, 4)])
@pytest.mark.parametrize("values", [1, 100, 1 << 24])
def test_blocks_are_those_of_the_whole_map(
    layout: TokenLayout, block: tuple[int, int], values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "_VALUES", values)
    torch.manual_seed(0)
    q, k = (torch.randn(3, 2, layout.tokens, 8) for _ in range(2))
    found = BlockStatistics(layout, ORDERS, block, groups=2, extremes=True)
    found.add(q[:1], k[:1], 2.0, 1)
    found.add(q[1:], k[1:], 2.0, 1)
    map = maps(q, k, 2.0)
    for order in ORDERS:
        wanted, made = blocks_of(map, layout, order, block), found.blocks(order)
        torch.testing.assert_close(made.sums[1], wanted.sum((-2, -1)).mean(0))
        torch.testing.assert_close(made.maxima[1], wanted.amax((-2, -1)).mean(0))
        assert not made.sums[0].any()
        inside = blocks_of(torch.ones_like(map), layout, order, block)
        few = (wanted < 17.5 / layout.tokens) * inside
        torch.testing.assert_close(made.small[1], few.sum((-2, -1)).mean(0))


def test_extremes_are_looked_at_only_if_asked_for() -> None:
    layout = LAYOUTS[0]
    q = torch.randn(1, 2, layout.tokens, 8)
    found = BlockStatistics(layout, ORDERS, (4, 4))
    found.add(q, q, 1.0)
    assert found.blocks("hw").sums.any()
    assert not found.blocks("hw").maxima.any()
