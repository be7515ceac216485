"""Muon beside AdamW: which parameters move, in which memory layout, and resuming."""

from __future__ import annotations

import copy

import torch
from torch import nn

from dq.checkpoints.train.optimizer import MuonAdamW


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 4, 1)
    )


def steps(model: nn.Module, optimizer: MuonAdamW, count: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(2, 4, 8, 8, generator=generator)).square().mean().backward()
        optimizer.step()


def test_every_parameter_moves() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    steps(model, MuonAdamW(model, 1e-3, 0.01), 1)
    assert not [name for name, p in model.state_dict().items() if torch.equal(p, before[name])]


def test_memory_layout_plays_no_part() -> None:
    start, plain, last = network(), network(), network().to(memory_format=torch.channels_last)
    for model in (plain, last):
        steps(model, MuonAdamW(model, 1e-3, 0.01), 1)
    for a, b, c in zip(plain.parameters(), last.parameters(), start.parameters(), strict=True):
        assert (a - b).norm() < 0.02 * (a - c).norm()  # bfloat16; mixed up, > 1


def test_the_step_of_a_matrix_is_orthogonal() -> None:
    model = nn.Sequential(nn.Linear(96, 64, bias=False))
    before = model[0].weight.detach().clone()
    optimizer = MuonAdamW(model, 1e-3, 0.0)
    model(torch.randn(8, 96, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    rank = torch.linalg.matrix_rank(model[0].weight.grad)
    optimizer.step()
    moved = torch.linalg.svdvals(model[0].weight.detach() - before)
    assert int(rank) == 8
    assert moved[0] / moved[7] < 2.5  # of the gradient: all its directions alike


def test_resumed_equals_uninterrupted() -> None:
    whole = network()
    optimizer = MuonAdamW(whole, 1e-3, 0.01)
    steps(whole, optimizer, 2)
    again = copy.deepcopy(whole)
    resumed = MuonAdamW(again, 1e-3, 0.01)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(whole, optimizer, 2)
    steps(again, resumed, 2)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_networks_without_matrices_are_trained_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    before = model[0].weight.detach().clone()
    steps_of = MuonAdamW(model, 1e-3, 0.0)
    model(torch.ones(1, 4)).sum().backward()
    steps_of.step()
    assert not torch.equal(model[0].weight, before)
