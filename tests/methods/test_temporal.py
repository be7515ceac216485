"""Layers that see the timestep: kept, or answered by a table."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dq.calibrate import CalibrationSpec, NeedsData
from dq.engine import quantize
from dq.errors import DQError
from dq.family import Role, family_of
from dq.methods.ptq import PTQ
from dq.methods.temporal import Temporal
from dq.nn import packed_layers
from dq.pipelines.draw import PipelineSource
from dq.plan import Plan
from dq.recipe import Recipe
from tests.models import MODELS
from tests.packed import CASES

SPEC = CalibrationSpec(n=1, steps=3, batch=1)
TIMED = [name for name in MODELS if name != "amused"]


def quantized(name: str, *steps: Any) -> tuple[Any, nn.Module, Plan]:
    pipe = CASES[name].build()
    model = CASES[name].network(pipe)
    return pipe, model, quantize(model, Recipe("t", steps, SPEC), PipelineSource(pipe))


def outputs(name: str, pipe: Any, layers: tuple[str, ...], steps: int) -> list[dict[str, Tensor]]:
    """What some layers put out in each call of the denoiser while images are drawn."""
    model = CASES[name].network(pipe)
    seen: list[dict[str, Tensor]] = []
    hooks = [model.register_forward_pre_hook(lambda *_: seen.append({}))]
    for layer in layers:
        hooks.append(
            model.get_submodule(layer).register_forward_hook(
                lambda m, a, y, layer=layer: seen[-1].__setitem__(layer, y)
            )
        )
    CASES[name].call(pipe, num_inference_steps=steps)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", [*TIMED, "emoji-unet", "emoji-dit"])
def test_cached_is_computed_bit_for_bit(name: str) -> None:
    original = CASES[name].build()
    layers = family_of(CASES[name].network(original)).timed(CASES[name].network(original))
    expected = outputs(name, original, layers, steps=3)
    # The batch is the same, or products of other sizes would differ in the last bit.
    pipe, model, plan = quantized(name, PTQ("int8", "int8", "dynamic"), Temporal("cache"))
    tabled = tuple(n for n in layers if n in plan.layers)
    assert tabled
    assert all(len(plan.layers[n].tabled) == 3 for n in tabled)
    found = outputs(name, pipe, tabled, steps=3)
    for mine, theirs in zip(found, expected, strict=True):
        for layer in tabled:
            assert torch.equal(mine[layer], theirs[layer])
    # Other timesteps fall back to the quantized layer, which is close and not equal.
    found, expected = (outputs(name, p, tabled, steps=5) for p in (pipe, original))
    (first, *_) = tabled
    pairs = [(m[first], t[first]) for m, t in zip(found, expected, strict=True)]
    assert not all(torch.equal(mine, theirs) for mine, theirs in pairs)
    assert all(torch.allclose(mine, theirs, atol=0.1) for mine, theirs in pairs)
    assert packed_layers(model)[first].path().startswith("stored for 3 timesteps, else ")


def test_other_schedules_can_be_stored() -> None:
    _, _, plan = quantized("sd32", PTQ("int8", "int8", "static"), Temporal("cache", (2, 4)))
    times = {spec.tabled for spec in plan.layers.values() if spec.tabled}
    assert len(times) == 1
    (found,) = times
    assert found == (1.0, 251.0, 501.0, 751.0)  # 501 is a step of both


def test_sdxl_adds_to_the_projections() -> None:
    model = MODELS["sdxl"].network(MODELS["sdxl"].build())
    assert family_of(model).timed(model) == ("time_embedding.linear_1", "time_embedding.linear_2")


@pytest.mark.parametrize("name", TIMED)
def test_kept_layers_stay_float(name: str) -> None:
    _, model, plan = quantized(name, PTQ("int8", "int8", "dynamic"), Temporal("keep"))
    roles = family_of(model).roles(model)
    time = {n for n, role in roles.items() if role is Role.TIME}
    assert time
    assert not time & plan.layers.keys()
    assert time <= plan.notes.keys()


def test_what_cannot_be() -> None:
    with pytest.raises(DQError, match="unknown value of treatment 'caches'"):
        Temporal("caches")
    with pytest.raises(DQError, match="schedules are for the treatment cache"):
        Temporal("keep", (3,))
    with pytest.raises(DQError, match=r"numbers of denoising steps, not \(0,\)"):
        Temporal("cache", (0,))
    model = MODELS["sd32"].network(MODELS["sd32"].build())
    step = PTQ("int8", "int8", "dynamic")
    with pytest.raises(NeedsData):
        quantize(model, Recipe("t", (step, Temporal("cache"))), None)
    with pytest.raises(DQError, match="nothing to cache; keep the layers of time instead"):
        quantized("sd32", PTQ(skip_roles=(Role.TIME,)), Temporal("cache"))
    with pytest.raises(DQError, match="nothing to cache"):
        quantized("amused", step, Temporal("cache"))
