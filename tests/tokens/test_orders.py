"""Orders of grids: permutations, with the axis that is named last running fastest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dq.errors import DQError
from dq.tokens.orders import TILES, candidates, natural, places

sizes = st.integers(1, 9)
grids = st.one_of(st.tuples(sizes, sizes), st.tuples(sizes, sizes, sizes))


@given(grids)
def test_every_order_has_every_token_once(grid: tuple[int, ...]) -> None:
    for order in candidates(grid, tiles=True):
        found = places(order, grid)
        assert torch.equal(found.sort().values, torch.arange(len(found)))


@given(grids)
def test_the_first_candidate_is_the_natural_order(grid: tuple[int, ...]) -> None:
    assert candidates(grid)[0] == natural(grid)
    assert torch.equal(places(natural(grid), grid), torch.arange(len(places(natural(grid), grid))))


@given(grids)
def test_no_two_candidates_are_the_same(grid: tuple[int, ...]) -> None:
    found = [tuple(places(order, grid).tolist()) for order in candidates(grid)]
    assert len(set(found)) == len(found)


def test_the_last_axis_runs_fastest() -> None:
    assert places("wh", (2, 3)).tolist() == [0, 3, 1, 4, 2, 5]
    assert places("hwf", (2, 1, 2)).tolist() == [0, 2, 1, 3]


def test_all_orders_of_axes_are_candidates() -> None:
    assert candidates((4, 5)) == ("hw", "wh")
    assert set(candidates((2, 3, 4))) == {"fhw", "fwh", "hfw", "hwf", "wfh", "whf"}
    assert candidates((1, 3, 4)) == ("fhw", "fwh")
    assert candidates((4, 4), tiles=True)[2:] == TILES[2]


def test_tiles_follow_each_other_and_are_cut_at_the_edge() -> None:
    assert places("tile2x2", (3, 3)).tolist() == [0, 1, 3, 4, 2, 5, 6, 7, 8]


@pytest.mark.parametrize("order", ["", "h", "hh", "fhw", "tile8", "tile2x2x2", "tile0x2"])
def test_unknown_orders_are_refused(order: str) -> None:
    with pytest.raises(DQError, match=f"unknown order '{order}' of a grid of 2 axes"):
        places(order, (4, 4))
