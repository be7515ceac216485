"""Norms that learn beside a teacher that keeps its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dq.tuning.norms import norms_as_before, norms_of, norms_to_learn


def network() -> nn.Sequential:
    model = nn.Sequential(nn.GroupNorm(2, 8), nn.LayerNorm(8, elementwise_affine=False))
    return model.append(nn.LayerNorm(8)).requires_grad_(False).bfloat16()


def test_those_with_weights_are_found() -> None:
    assert [*norms_of(network())] == ["0", "2"]


def test_copies_learn_and_the_originals_stay() -> None:
    model = network()
    first = model[0]
    originals = norms_to_learn(model)
    assert originals["0"] is first
    assert model[0] is not first
    assert all(p.requires_grad for n in originals for p in model.get_submodule(n).parameters())
    assert not first.weight.requires_grad


def test_dtype_and_wish_for_gradients_are_put_back_even_if_it_fails() -> None:
    model = network()
    with pytest.raises(KeyboardInterrupt), norms_as_before(model):
        model.float()
        norms_to_learn(model)
        raise KeyboardInterrupt
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())
