"""Orders and masks in the forms that kernels want."""

from __future__ import annotations

import torch

from dq.kernels.live_blocks import LiveBlocks
from dq.tokens import TokenLayout


def blocks() -> LiveBlocks:
    layout = TokenLayout((3, 3), 2)
    tables = torch.stack([layout.table(order, 4) for order in ("hw", "wh")])
    live = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    live |= torch.eye(4, dtype=torch.bool)
    return LiveBlocks(tables, live, (4, 4))


def test_lists_name_the_live_blocks_in_their_order() -> None:
    made = blocks()
    counts, numbers = made.lists
    for head in range(2):
        for row in range(4):
            found = numbers[head, row, : counts[head, row]].tolist()
            assert found == made.live[head, row].nonzero().squeeze(1).tolist()
    assert counts.dtype == numbers.dtype == torch.int32


def test_tokens_come_back_to_where_they_were() -> None:
    made, x = blocks(), torch.randn(3, 2, 11, 5)
    moved = made.moved(x)
    assert moved.shape == (3, 2, 16, 5)
    assert torch.equal(made.restored(moved), x)
    assert torch.equal(moved[:, 1, 1], x[:, 1, 3])  # column by column


def test_the_mask_is_of_live_blocks_and_tokens_that_are_there() -> None:
    made = blocks()
    mask = made.mask
    for head, row, column in torch.cartesian_prod(*map(torch.arange, (2, 16, 16))).tolist():
        live = made.live[head, row // 4, column // 4] & (made.table[head, column] >= 0)
        if made.table[head, row] >= 0:
            assert mask[head, row, column] == live
    assert mask.any(-1).all()
