"""Attention with ordered tokens in compiled graphs: from the first call on, and with gradients."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dq.calibrate import CalibrationSpec
from dq.calls import run
from dq.engine import quantize
from dq.family import family_of
from dq.method import Method
from dq.methods.operands import Operands
from dq.methods.paro import PARO
from dq.recipe import Recipe
from dq.runtime import compile_blocks
from tests.models import MODELS
from tests.packed import relative_error
from tests.sources import Samples

BY_BLOCK = PARO(0.5, (8,), query_key="int8")


def made(*steps: Method) -> nn.Module:
    model = MODELS["dit64"].network(MODELS["dit64"].build()).eval()
    quantize(model, Recipe("t", steps, CalibrationSpec(n=2, steps=2, batch=2)), Samples(model))
    torch._dynamo.reset()
    return model


def inputs(model: nn.Module) -> dict[str, Any]:
    return family_of(model).sample_inputs(model, 2, torch.Generator().manual_seed(7))


@pytest.mark.parametrize("steps", [(PARO(0.5, (8,)),), (BY_BLOCK,), (Operands(), PARO(0.5, (8,)))])
def test_a_thread_that_begins_with_a_compiled_call(steps: tuple[Method, ...]) -> None:
    """What such a thread knows of the attention it is in is asked for by the graph's guards."""
    model = made(*steps)
    compiled = copy.deepcopy(model)
    compile_blocks(compiled, backend="aot_eager")

    def draw() -> Tensor:
        with torch.no_grad():
            return run(compiled, inputs(compiled))

    with ThreadPoolExecutor(1) as threads:
        found = threads.submit(draw).result()
    with torch.no_grad():
        assert relative_error(found, run(model, inputs(model))) < 1e-4


@pytest.mark.parametrize("step", [PARO(0.5, (8,)), BY_BLOCK])
def test_gradients(step: PARO) -> None:
    model = made(step)
    compiled = copy.deepcopy(model)
    compile_blocks(compiled, backend="aot_eager")
    found = []
    for each in (model, compiled):
        weights = [
            p for n, p in each.named_parameters() if ".attn1.to_" in n and n.endswith("weight")
        ]
        for weight in weights:
            weight.requires_grad_()
        loss = run(each, inputs(each)).square().mean()
        found.append(torch.autograd.grad(loss, weights))
    for expected, gradient in zip(*found, strict=True):
        assert expected.abs().max() > 0
        assert relative_error(gradient, expected) < 1e-3
