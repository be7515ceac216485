"""Running a model again from one of its layers on changes nothing but time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dq.calls import run
from dq.family import family_of, quantizable
from dq.sensitivity.prefix import Prefix, stages
from dq.sensitivity.trace import trace
from tests.models import MODELS
from tests.sensitivity.probes import network

each = pytest.mark.parametrize("name", MODELS)


def inputs(model: nn.Module) -> dict:
    return family_of(model).sample_inputs(model, 2, torch.Generator().manual_seed(0))


@each
@torch.no_grad()
def test_from_every_layer_on_the_output_is_the_same(name: str) -> None:
    model = network(name)
    call = inputs(model)
    seen = trace(model, call)
    assert set(seen.order) <= set(quantizable(model))
    prefix = Prefix(model, seen.ran - {""})
    y = prefix.record(call)
    assert torch.equal(y, run(model, call))
    assert prefix.repeats(call, seen.order)
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


@each
@torch.no_grad()
def test_a_changed_layer_changes_the_output_as_it_does_in_a_whole_run(name: str) -> None:
    model = network(name)
    call = inputs(model)
    seen = trace(model, call)
    prefix = Prefix(model, [*stages(model, seen.ran), *seen.order])
    prefix.record(call)
    for layer in seen.order[:: max(1, len(seen.order) // 12)]:
        weight = model.get_submodule(layer).weight
        before = weight.data.clone()
        weight.data.mul_(1.1)
        whole = run(model, call)
        with prefix.remembered():
            assert torch.equal(prefix.rerun(call, layer), whole), layer
        weight.data.copy_(before)


@each
def test_stages_cover_every_layer_that_ran_once(name: str) -> None:
    model = network(name)
    seen = trace(model, inputs(model))
    found = stages(model, seen.ran)
    for layer in seen.order:
        around = [s for s in found if layer == s or layer.startswith(f"{s}.")]
        assert len(around) == 1
    sizes = [sum(n.startswith(f"{s}.") for n in quantizable(model)) for s in found]
    assert max(sizes) <= 12


def test_only_what_follows_runs() -> None:
    model = network("sd32")
    call = inputs(model)
    seen = trace(model, call)
    prefix = Prefix(model, seen.ran - {""})
    with torch.no_grad():
        prefix.record(call)
    ran: list[str] = []
    for name in seen.order:
        layer = model.get_submodule(name)

        def forward(x, name=name, layer=layer):
            ran.append(name)
            return type(layer).forward(layer, x)

        layer.forward = forward
    with torch.no_grad(), prefix.remembered():
        prefix.rerun(call, "up_blocks.1.resnets.0.conv1")
    place = seen.order.index("up_blocks.1.resnets.0.conv1")
    assert ran == seen.order[place:]
    assert all("forward" in model.get_submodule(n).__dict__ for n in seen.order)  # given back


class Random(nn.Module):
    """A model that does not repeat itself."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, return_dict=True):
        return (self.two(self.one(x) + torch.randn(4)),)


class InPlace(Random):
    """A model that changes what a layer has returned."""

    def forward(self, x, return_dict=True):
        y = self.one(x)
        z = self.two(y)
        y.mul_(2)
        return (z + y,)


@torch.no_grad()
@pytest.mark.parametrize("kind", [Random, InPlace])
def test_models_that_do_not_repeat_themselves_are_noticed(kind: type[nn.Module]) -> None:
    model = kind()
    prefix = Prefix(model, ["one", "two"])
    call = {"x": torch.ones(1, 4)}
    prefix.record(call)
    assert not prefix.repeats(call, ["one", "two"])


def test_layers_that_see_one_tensor_are_found() -> None:
    model = network("sd32")
    seen = trace(model, inputs(model))
    attention = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    assert tuple(f"{attention}.to_{x}" for x in "qkv") in seen.sharing
    prompts = next(group for group in seen.sharing if any("attn2.to_k" in n for n in group))
    assert all("attn2.to_k" in name or "attn2.to_v" in name for name in prompts)
    grouped = [name for group in seen.sharing for name in group]
    assert len(grouped) == len(set(grouped))


def test_multiply_adds_are_counted_for_one_image() -> None:
    model = network("dit64")
    seen = trace(model, inputs(model))
    tokens = (model.config.sample_size // model.config.patch_size) ** 2
    layer = model.transformer_blocks[0].attn1.to_q
    expected = tokens * layer.in_features * layer.out_features
    assert seen.macs["transformer_blocks.0.attn1.to_q"] == expected
