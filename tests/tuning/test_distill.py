"""The loss between a quantized denoiser and itself in full precision."""

import pytest
import torch
from torch import nn

from dq.calls import Call
from dq.engine import start
from dq.family import family_of
from dq.methods.ptq import PTQ
from dq.nn import QuantLayer, install
from dq.recipe import Recipe
from dq.tuning.distill import Distillation
from tests.models import MODELS
from tests.sources import Samples

NAMES = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.2")


def simulated() -> tuple[nn.Module, nn.Module, Call]:
    """A model, its quantized form, and a call."""
    model, original = (MODELS["dit64"].network(MODELS["dit64"].build()).eval() for _ in range(2))
    step = PTQ("int4", "int8", "dynamic")
    job = start(model, Recipe("t", (step,)), Samples(model), None)
    install(model, step.decide(job))
    call = family_of(original).sample_inputs(original, 3, torch.Generator().manual_seed(5))
    return model, original, call


@pytest.mark.parametrize(("local", "whole"), [(0.0, 2.0), (1.0, 0.0), (0.5, 3.0)])
@torch.no_grad()
def test_it_is_the_sum_that_the_paper_has(local: float, whole: float) -> None:
    model, original, call = simulated()
    seen: dict[str, dict[str, torch.Tensor]] = {"student": {}, "teacher": {}}
    for who, network in (("student", model), ("teacher", original)):
        for name in NAMES:
            network.get_submodule(name).register_forward_hook(
                lambda m, a, y, who=who, name=name: seen[who].__setitem__(name, y)
            )
    outputs = [network(**call, return_dict=False)[0] for network in (model, original)]
    expected = whole * (outputs[0] - outputs[1]).square().mean()
    for name in NAMES:
        expected += local * (seen["student"][name] - seen["teacher"][name]).square().mean()
    found = Distillation(model, NAMES, local, whole)(call)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert float(found) > 0


@torch.no_grad()
def test_the_teacher_computes_the_same_bits_as_before() -> None:
    model, original, call = simulated()
    wanted = original(**call, return_dict=False)[0]
    loss = Distillation(model, NAMES, 1.0, 2.0)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLayer)}
    for layer in layers.values():  # what was learned does not reach it
        layer.weight_quantizer.learn().add_(1.0)
    teacher, _ = loss.teacher(call)
    assert torch.equal(teacher, wanted)
    assert {n: m for n, m in model.named_modules() if isinstance(m, QuantLayer)} == layers
