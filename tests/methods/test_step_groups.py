"""Scales for groups of steps, found by the timestep of a call."""

import pytest
import torch

from dq.calibrate import Calibration, CalibrationSpec
from dq.engine import quantize
from dq.errors import DQError
from dq.family import Role, family_of
from dq.methods.ptq import PTQ
from dq.methods.step_groups import StepGroups, captured_times, centres
from dq.nn import packed_layers
from dq.pipelines.draw import PipelineSource
from dq.recipe import Recipe
from tests.packed import CASES

SPEC = CalibrationSpec(n=2, steps=8, batch=2)
W8 = PTQ("int8", "int8", "static")


def test_centres_are_means_of_neighbours() -> None:
    assert centres([0.0, 10.0, 20.0, 90.0, 100.0], 2) == (10.0, 95.0)
    assert centres([1.0, 2.0], 2) == (1.0, 2.0)
    assert centres([1.0, 2.0, 6.0], 1) == (3.0,)
    with pytest.raises(DQError, match=r"3 step groups need as many timesteps, .* has 2"):
        centres([1.0, 2.0], 3)


@pytest.mark.parametrize("name", ["sd32", "dit64", "flux", "emoji-unet"])
def test_each_group_has_the_range_of_its_steps(name: str) -> None:
    pipe = CASES[name].build()
    model = CASES[name].network(pipe)
    source = PipelineSource(pipe)
    times = captured_times(model, Calibration(model, source, SPEC))
    assert len(times) == 8
    plan = quantize(model, Recipe("t", (W8, StepGroups(2)), SPEC), source)
    roles = family_of(model).roles(model)
    grouped = {n: s for n, s in plan.layers.items() if s.input and s.input.step_groups}
    assert grouped
    assert all(spec.input.step_groups == centres(times, 2) for spec in grouped.values())
    timeless = {n for n in plan.layers if roles[n] in (Role.CAPTION, Role.CROSS_KV)}
    assert not timeless & grouped.keys()
    # The same layer calibrated at the steps of one group alone has that group's scale.
    other = CASES[name].build()
    alone = CASES[name].network(other)
    quantize(alone, Recipe("t", (W8,), SPEC), PipelineSource(other))
    scales = {n: packed_layers(m)[n].input_affine[..., 0] for m in (alone,) for n in grouped}
    mine = {n: packed_layers(model)[n].input_affine[..., 0] for n in grouped}
    drifted = 0
    for n in grouped:
        assert mine[n].shape == (2, *scales[n].shape)
        drifted += not torch.allclose(mine[n][0], mine[n][1], rtol=0.02)
    assert drifted > len(grouped) / 4


def test_it_needs_static_inputs_and_a_timestep() -> None:
    for name, step, text in (
        ("sd32", PTQ("int8", "int8", "dynamic"), "no input has static scales"),
        ("amused", W8, "UVit2DModel is not told the timestep"),
    ):
        pipe = CASES[name].build()
        model = CASES[name].network(pipe)
        with pytest.raises(DQError, match=text):
            quantize(model, Recipe("t", (step, StepGroups(2)), SPEC), PipelineSource(pipe))
        assert not packed_layers(model)
    with pytest.raises(DQError, match="groups is 1 or more"):
        StepGroups(0)
