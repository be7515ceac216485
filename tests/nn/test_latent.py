"""Layers whose weights and scales are learned, and what is packed of them."""

import pytest
import torch
from torch import nn

from dq.nn import Quantizer, QuantLayer, exchanged, pack_model, plain_layers
from dq.nn.latent import FullWeight, LowRankWeight
from dq.nn.packed import packed
from dq.plan import LayerSpec
from dq.presets import input_preset, weight_preset
from tests.nn.layers import LAYERS, build, calibrated

SPEC = LayerSpec(weight_preset("int4-g0"), input_preset("int8", dynamic=False))
each = pytest.mark.parametrize("name", LAYERS)


def learning(name: str, low_rank: bool = False) -> tuple[QuantLayer, torch.Tensor]:
    layer, x = build(name)
    made = calibrated(layer, x, SPEC)
    start, generator = made.matrix(), torch.Generator().manual_seed(0)
    made.latent = LowRankWeight(start, 2, generator) if low_rank else FullWeight(start)
    if made.bias is not None:
        made.latent_bias = nn.Parameter(made.bias.detach().clone())
    for quantizer in made.input_quantizers:
        quantizer.learn()
    return made, x


@pytest.mark.parametrize("low_rank", [False, True])
@each
def test_it_begins_where_it_was(name: str, low_rank: bool) -> None:
    layer, x = build(name)
    made, _ = learning(name, low_rank)
    assert torch.equal(made(x), calibrated(layer, x, SPEC)(x))


@pytest.mark.parametrize("low_rank", [False, True])
@each
def test_everything_learns_and_is_packed(name: str, low_rank: bool) -> None:
    layer, x = build(name)
    made, _ = learning(name, low_rank)
    before, wanted = made(x).detach(), layer(x).detach()
    mine = [p for n, p in made.named_parameters() if n not in ("weight", "bias")]
    loss = (made(x) - wanted).square().mean()
    loss.backward()
    assert all(
        p.grad is not None and p.grad.any()
        for p in mine
        if p is not getattr(made.latent, "down", None)
    )
    with torch.no_grad():
        for parameter in mine:
            parameter += 0.05 * torch.randn(parameter.shape)
    after = made(x).detach()
    assert not torch.equal(after, before)
    assert torch.equal(layer(x), wanted)  # the float layer, which is the teacher, has not moved
    for module in made.modules():
        if isinstance(module, Quantizer):
            module.settle()
    assert torch.equal(made(x), after)
    done = packed(layer, SPEC)
    done.load_layer(made)
    assert torch.allclose(done.simulate(x, done.bias), after, atol=1e-5)


def test_a_scale_that_was_not_moved_is_the_very_same() -> None:
    made, _ = learning("linear")
    quantizer = made.input_quantizers[0]
    scale = quantizer.scale.clone()
    quantizer.settle()
    assert torch.equal(quantizer.scale, scale)
    assert quantizer.gain is None


def test_the_teacher_is_the_float_model() -> None:
    layer, x = build("linear")
    model = nn.Sequential(layer, nn.GELU())
    wanted = model(x).detach()
    model[0] = learning("linear")[0]
    student = model(x).detach()
    assert not torch.equal(student, wanted)
    with exchanged(model, plain_layers(model)):
        assert torch.equal(model(x), wanted)
        assert model[0].weight is not None
    assert torch.equal(model(x), student)
    pack_model(model)
