"""A quantized denoiser as it was before, for a while."""

import pytest
import torch
from torch import nn

from dq import attention
from dq.calls import run
from dq.engine import start
from dq.family import family_of
from dq.full_precision import as_float32, floated, full_precision
from dq.methods.operands import Operands
from dq.methods.ptq import PTQ
from dq.nn import QuantLayer, install
from dq.recipe import Recipe
from tests.models import MODELS
from tests.sources import Samples


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_layers_and_attention_are_exact_inside_and_quantized_after(name: str) -> None:
    model = MODELS[name].network(MODELS[name].build()).eval()
    call = family_of(model).sample_inputs(model, 2, torch.Generator().manual_seed(0))
    expected = run(model, call)
    steps = PTQ("int4", "int8", "dynamic"), Operands()
    job = start(model, Recipe("t", steps), Samples(model), None)
    for step in steps:
        job.plan = step.decide(job)
    install(model, job.plan)
    layers_alone = run(model, call)
    attention.change(model, job.plan.attention)
    quantized = run(model, call)
    assert not torch.equal(quantized, layers_alone)
    assert not torch.equal(layers_alone, expected)
    for _ in range(2):
        with full_precision(model):
            assert torch.equal(run(model, call), expected)
            assert not any(isinstance(m, QuantLayer) for m in model.modules())
        assert torch.equal(run(model, call), quantized)


def test_it_ends_when_something_fails() -> None:
    model = MODELS["dit64"].network(MODELS["dit64"].build())
    job = start(model, Recipe("t", (Operands(),)), Samples(model), None)
    attention.change(model, Operands().decide(job).attention)
    kinds = [type(m.processor) for m in model.modules() if hasattr(m, "processor")]
    with pytest.raises(KeyboardInterrupt), full_precision(model):
        raise KeyboardInterrupt
    assert [type(m.processor) for m in model.modules() if hasattr(m, "processor")] == kinds


def test_float32_for_a_while() -> None:
    model = nn.Linear(3, 2).bfloat16()
    weight = model.weight
    with as_float32(model):
        assert model.weight is weight
        assert model(floated({"x": torch.ones(1, 3).bfloat16()})["x"]).dtype == torch.float32
    assert weight.dtype == torch.bfloat16
    kept = {"n": torch.tensor(3), "flag": None, "deep": {"y": torch.ones(2).half()}}
    found = floated(kept)
    assert found["n"].dtype == torch.int64
    assert found["flag"] is None
    assert found["deep"]["y"].dtype == torch.float32
