"""What an attention stores of ordered tokens, and what it makes of it at a timestep."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from dq.errors import DQError
from dq.nn.token_site import TokenSite
from dq.tokens import TokenLayout, TokenSpec
from dq.tokens.choice import Chosen

SPEC = TokenSpec(TokenLayout((8, 4), 6), 2, ("hw", "wh"), (8, 8), (100.0, 900.0))


def chosen() -> Chosen:
    masks = torch.rand(2, 2, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    return Chosen(torch.tensor([1, 0]), masks | torch.eye(4, dtype=torch.bool))


def test_orders_and_masks_are_those_that_were_chosen() -> None:
    site, wanted = TokenSite(SPEC, chosen()), chosen()
    assert torch.equal(site.masks(), wanted.masks)
    blocks = site.live(1)
    assert torch.equal(blocks.live[:, :4, :4], wanted.masks[1])
    assert torch.equal(blocks.table[0], SPEC.table("wh"))
    assert torch.equal(blocks.table[1], SPEC.table("hw"))


def test_text_meets_everything() -> None:
    live = TokenSite(SPEC, chosen()).live().live
    assert live.shape == (2, 5, 5)
    assert live[:, 4].all()
    assert live[:, :, 4].all()


def test_density_counts_all_blocks() -> None:
    site = TokenSite(SPEC, chosen())
    wanted = torch.stack([site.live(group).live for group in range(2)]).float().mean()
    assert site.density() == pytest.approx(float(wanted))


def test_what_was_made_is_kept_until_it_changes() -> None:
    site = TokenSite(SPEC, chosen())
    first = site.live(0)
    assert site.live(0) is first
    assert site.live(1) is not first
    with torch.no_grad():
        site.block_mask.zero_()
    assert not site.live(1).live[:, :4, :4].any()


def test_copies_and_pickles_are_whole() -> None:
    site = TokenSite(SPEC, chosen())
    site.live()
    for other in (copy.deepcopy(site), pickle.loads(pickle.dumps(site))):
        assert torch.equal(other.masks(), site.masks())
        assert other.spec == site.spec


def test_casts_leave_it_alone() -> None:
    site = nn.Sequential(TokenSite(SPEC, chosen())).half()[0]
    assert isinstance(site, TokenSite)
    assert site.block_mask.dtype == site.token_order.dtype == torch.uint8


def test_other_tokens_are_refused() -> None:
    site = TokenSite(SPEC, chosen())
    q = torch.zeros(1, 2, 38, 4)
    site.check(q, q)
    with pytest.raises(DQError, match=r"calibrated for 8x4 \+ 6 text, 38 tokens; the call has 39"):
        site.check(torch.zeros(1, 2, 39, 4), q)
    with pytest.raises(DQError, match="masks of 2 heads, the call has 3"):
        site.check(torch.zeros(1, 3, 38, 4), torch.zeros(1, 3, 38, 4))


def test_masks_of_another_spec_are_refused() -> None:
    with pytest.raises(DQError, match="are not those of 2 heads"):
        TokenSite(SPEC, chosen()._replace(masks=chosen().masks[:1]))


def test_by_itself_it_does_not_know_the_timestep() -> None:
    with pytest.raises(DQError, match="call it through its denoiser"):
        TokenSite(SPEC, chosen()).group()
