"""Mean and slope of the output's error, and what taking them out does."""

from typing import Any

import pytest
import torch
from torch import nn

from dq.calibrate import Calibration, CalibrationSpec
from dq.calls import run
from dq.engine import quantize
from dq.errors import DQError
from dq.family import family_of
from dq.method import Method
from dq.methods.ptq import PTQ
from dq.methods.ptqd import PTQD, Moments, correction
from dq.pipelines.draw import PipelineSource
from dq.plan import Plan
from dq.recipe import Recipe
from tests.packed import CASES


def outputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(64, 5, 16, generator=generator)
    noise = 0.01 * torch.randn(full.shape, generator=generator)
    bias = torch.tensor([0.3, -0.1, 0.0, 0.2, 1.0]).view(5, 1)
    return full, 1.25 * full + bias + noise


def test_slope_and_bias_are_found_and_taken_out() -> None:
    full, quantized = outputs()
    found = Moments.of(full, quantized, axis=1)
    gain, shift = correction(found)
    assert gain.tolist() == pytest.approx([1 / 1.25] * 5, rel=1e-3)
    assert (-shift / gain).tolist() == pytest.approx([0.3, -0.1, 0.0, 0.2, 1.0], abs=2e-3)
    corrected = quantized * gain.view(5, 1) + shift.view(5, 1)
    assert found.error(gain, shift) == pytest.approx(
        float((corrected - full).square().mean()), rel=1e-4
    )
    one, none = torch.ones(5), torch.zeros(5)
    assert found.error(one, none) == pytest.approx(float((quantized - full).square().mean()), 1e-5)


def test_negative_slopes_count_as_none() -> None:
    full, _ = outputs()
    gain, shift = correction(Moments.of(full, 0.5 * full + 2.0, axis=1))
    assert gain.tolist() == [1.0] * 5
    mean = full.movedim(1, -1).flatten(0, 1).mean(0)
    assert shift.tolist() == pytest.approx((-2.0 + 0.5 * mean).tolist(), abs=1e-5)


def test_means_over_outputs() -> None:
    full, quantized = outputs()
    parts = [Moments.of(full[i : i + 16], quantized[i : i + 16], 1) for i in range(0, 64, 16)]
    for mine, theirs in zip(Moments.mean(parts), Moments.of(full, quantized, 1), strict=True):
        assert torch.allclose(mine, theirs)


def held_out_error(pipe: Any, model: nn.Module, *steps: Method) -> tuple[float, Plan]:
    """Mean squared error of the output on images that a recipe was not calibrated on."""
    spec = CalibrationSpec(n=8, steps=4, batch=4)
    source = PipelineSource(pipe)
    others = Calibration(model, source, source.held_out(spec, 4))
    calls = [call for batch in others.batches() for call in batch]
    with torch.no_grad():
        wanted = [run(model, call) for call in calls]
    plan = quantize(model, Recipe("t", steps, spec), source)
    with torch.no_grad():
        pairs = [(run(model, c), y) for c, y in zip(calls, wanted, strict=True)]
    return sum(float((a - b).square().mean()) for a, b in pairs), plan


@pytest.mark.parametrize("name", ["emoji-unet", "emoji-dit"])
def test_it_does_not_harm(name: str) -> None:
    errors = []
    for steps in ((), (PTQD(2),)):
        pipe = CASES[name].build()
        model = CASES[name].network(pipe)
        error, plan = held_out_error(pipe, model, PTQ("int3", "int8"), *steps)
        errors.append(error)
    assert errors[1] < 1.01 * errors[0]
    assert len(plan.layers[family_of(model).output(model)].output_groups) == 2


def test_a_float_last_layer_is_quantized_to_carry_it() -> None:
    pipe = CASES["flux"].build()
    model = CASES["flux"].network(pipe)
    spec = CalibrationSpec(n=1, steps=2, batch=1)
    recipe = Recipe("t", (PTQ("int8", "int8"), PTQD(1)), spec)
    plan = quantize(model, recipe, PipelineSource(pipe))
    assert plan.layers["proj_out"].weight.format == "int8"
    assert plan.layers["proj_out"].input is None
    assert "carries the correction" in plan.notes["proj_out"]


def test_models_without_a_timestep_or_a_last_layer_are_refused() -> None:
    pipe = CASES["amused"].build()
    model = CASES["amused"].network(pipe)
    recipe = Recipe("t", (PTQ("int8", "int8"), PTQD(1)), CalibrationSpec(n=1, steps=2, batch=1))
    with pytest.raises(DQError, match="ptqd"):
        quantize(model, recipe, PipelineSource(pipe))
    with pytest.raises(DQError, match="groups is 1 or more"):
        PTQD(0)
