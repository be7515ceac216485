"""Norms that learn beside a teacher that keeps its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dq.nn.swap import plain_layers, uninstall
from dq.tuning.norms import norms_as_before, norms_of, norms_to_learn


def network() -> nn.Sequential:
    model = nn.Sequential(nn.GroupNorm(2, 8), nn.LayerNorm(8, elementwise_affine=False))
    return model.append(nn.LayerNorm(8)).requires_grad_(False).bfloat16()


def test_those_with_weights_are_found() -> None:
    assert [*norms_of(network())] == ["0", "2"]


def test_copies_learn_and_the_originals_stay() -> None:
    model = network()
    first = model[0]
    made = norms_to_learn(model)
    assert model[0] is made["0"] is not first
    assert made["0"].weight.dtype == torch.float32
    assert all(p.requires_grad for norm in made.values() for p in norm.parameters(recurse=False))
    assert not first.weight.requires_grad
    assert norms_of(model) == made
    assert norms_to_learn(model)["0"] is not made["0"]
    assert plain_layers(model)["0"] is first  # not what has learned in between
    uninstall(model)
    assert model[0] is first


def test_dtype_and_wish_for_gradients_are_put_back_even_if_it_fails() -> None:
    model = network()
    with pytest.raises(KeyboardInterrupt), norms_as_before(model):
        model.float()
        norms_to_learn(model)
        raise KeyboardInterrupt
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())
