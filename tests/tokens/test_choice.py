"""Orders are judged, and blocks chosen, as the definitions say."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dq.tokens import TokenLayout
from dq.tokens.choice import RULES, in_orders, mass_kept, paper_score, threshold
from dq.tokens.statistics import BlockStatistics

each_rule = pytest.mark.parametrize("rule", [*RULES])


def local(grid: tuple[int, int], axis: int, width: float = 0.7) -> tuple[Tensor, Tensor]:
    """Return q and k `(1, 1, N, D)` of a head that attends to neighbours along one axis alone."""
    where = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), -1).view(-1, 2)
    angles = where.float() * 2 * torch.pi / torch.tensor(grid)
    other = 1 - axis
    near = torch.stack([angles[:, axis].cos(), angles[:, axis].sin()], -1) * width
    same = torch.stack([angles[:, other].cos(), angles[:, other].sin()], -1) * 20
    x = torch.cat([near, same], -1)[None, None]
    return x, x


@pytest.mark.parametrize(("axis", "wanted"), [(1, "hw"), (0, "wh")])
def test_both_criteria_find_the_axis_of_a_head(axis: int, wanted: str) -> None:
    layout, orders = TokenLayout((16, 16)), ("hw", "wh")
    found = BlockStatistics(layout, orders, (16, 16), extremes=True)
    found.add(*local((16, 16), axis), 1.0)
    blocks = {order: found.blocks(order) for order in orders}
    kept = torch.stack([mass_kept(b.sums, 0.2) for b in blocks.values()])[:, 0, 0]
    assert orders[int(kept.argmax())] == wanted
    assert kept.max() > 0.9 > kept.min()
    rough = paper_score(blocks, 256, alpha=0.0)[:, 0]
    assert orders[int(rough.argmin())] == wanted


def test_the_paper_takes_a_block_with_one_diagonal_for_an_empty_one() -> None:
    layout, orders = TokenLayout((16, 16)), ("hw", "wh")
    found = BlockStatistics(layout, orders, (16, 16), extremes=True)
    found.add(*local((16, 16), 1), 1.0)
    filled = paper_score({order: found.blocks(order) for order in orders}, 256, alpha=1.0)[:, 0]
    assert filled.tolist() == [1, 0]  # though the second needs every block


def test_the_score_weighs_what_is_filled_and_what_is_rough() -> None:
    layout, orders = TokenLayout((16, 16)), ("hw", "wh")
    found = BlockStatistics(layout, orders, (16, 16), extremes=True)
    found.add(*local((16, 16), 0), 1.0)
    blocks = {order: found.blocks(order) for order in orders}
    sparse, rough = (paper_score(blocks, 256, alpha) for alpha in (1.0, 0.0))
    torch.testing.assert_close(paper_score(blocks, 256, 0.25), 0.25 * sparse + 0.75 * rough)
    torch.testing.assert_close(sparse.sum(0), torch.ones(1))
    torch.testing.assert_close(rough.sum(0), torch.ones(1))


def test_mass_is_that_of_the_largest_blocks() -> None:
    sums = torch.tensor([[[5.0, 1.0], [2.0, 2.0]]])
    assert mass_kept(sums, 0.5).item() == pytest.approx(0.7)
    assert mass_kept(sums, 1.0).item() == 1


@each_rule
@given(seed=st.integers(0, 99), density=st.floats(0.2, 1.0))
def test_the_density_is_the_one_asked_for(rule: str, seed: int, density: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    sums = [torch.rand(2, 2, 3, n, n, generator=generator) for n in (8, 10)]
    forced = [torch.eye(n, dtype=torch.bool) for n in (8, 10)]
    masks = [found.masks for found in RULES[rule](sums, forced, density)]
    kept = sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert kept == pytest.approx(density, abs=0.01)
    for mask, always in zip(masks, forced, strict=True):
        assert mask[..., always].all()


@each_rule
def test_what_is_left_out_is_smaller_than_what_is_kept(rule: str) -> None:
    sums = torch.rand(2, 1, 2, 8, 8)
    ((orders, mask),) = RULES[rule]([sums], [torch.zeros(8, 8, dtype=torch.bool)], 0.4)
    for head, order in enumerate(orders.tolist()):
        mine, kept = sums[order, 0, head], mask[0, head]
        assert mine[kept].min() > mine[~kept].max()


@each_rule
def test_forced_blocks_stay_at_any_density(rule: str) -> None:
    forced = torch.eye(8, dtype=torch.bool)
    ((_, mask),) = RULES[rule]([torch.rand(3, 1, 2, 8, 8)], [forced], 0.01)
    assert torch.equal(mask[0, 0], forced)


def test_a_threshold_gives_more_to_heads_that_spread_out() -> None:
    peaked, flat = torch.zeros(8, 8), torch.full((8, 8), 1.0)
    peaked[0, 0] = 64.0
    sums = torch.stack([peaked, flat])[None, None]
    ((_, mask),) = threshold([sums], [torch.eye(8).bool()], 0.6)
    assert mask[0, 1].sum() > mask[0, 0].sum()


@given(seed=st.integers(0, 999), density=st.floats(0.2, 0.9))
def test_no_other_orders_hold_more_in_as_many_blocks(seed: int, density: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    sums = torch.rand(2, 1, 3, 12, 12, generator=generator) ** 4
    forced = [torch.eye(12, dtype=torch.bool)]

    def held(orders: Tensor) -> float:
        ((_, masks),) = threshold([in_orders(sums, orders)[None]], forced, density)
        return float((in_orders(sums, orders) * masks).sum())

    ((orders, _),) = threshold([sums], forced, density)
    others = (torch.tensor(each) for each in itertools.product(range(2), repeat=3))
    assert max(map(held, others)) <= 1.002 * held(orders)


def test_an_order_is_judged_at_the_density_that_its_head_gets() -> None:
    sums = torch.zeros(2, 1, 2, 8, 8)
    sums[:, 0, 0, :, :4] = 10.0  # a head that takes most of the blocks
    sums[0, 0, 1, 0, 1], sums[0, 0, 1, 2:, 0] = 20.0, 2.0  # little more is in its largest block
    sums[1, 0, 1, 0, 1:5] = 8.0  # four of which hold more
    density = (32 + 4 + 8 + 1) / 128
    ((orders, _),) = threshold([sums], [torch.eye(8).bool()], density)
    assert orders[1] == 0
    wide = threshold([sums], [torch.eye(8).bool()], density + 3 / 128)
    assert wide[0].orders[1] == 1
