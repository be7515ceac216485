"""The recipe through whole pipelines."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from dq import DQPipeline
from dq.calibrate import Calibration, CalibrationSpec, NeedsData
from dq.engine import decide, quantize
from dq.errors import DQError
from dq.family import Role, family_of
from dq.methods.bos import BOS
from dq.methods.mixdq import MixDQ
from dq.methods.ptq import PTQ
from dq.nn import QuantLayer, matrix_shape, packed_layers
from dq.pipelines.draw import PipelineSource
from dq.recipe import Recipe
from tests.models import MODELS
from tests.packed import FOLDERS
from tests.sensitivity.probes import network
from tests.sources import Samples

SHORT = CalibrationSpec(n=4, steps=3, batch=4)
QUICK = MixDQ(share=0.0, steps=1, held_out=0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tables of tests are kept apart from the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dq" / "sensitivity"


def recipe(**settings) -> Recipe:
    return Recipe("test", (dataclasses.replace(QUICK, **settings),), SHORT)


@pytest.mark.parametrize("name", ["sd32", "sdxl", "dit64", "flux"])
def test_it_takes_no_more_bytes_than_the_uniform_recipe(model_folders, name: str) -> None:
    mixed = DQPipeline.from_pretrained(model_folders(name), recipe())
    uniform = Recipe("uniform", (PTQ("int4", "int8"), BOS()), SHORT)
    same = DQPipeline.from_pretrained(model_folders(name), uniform)
    size, limit = mixed.footprint().planned_bytes, same.footprint().planned_bytes
    # Float weights count 2 bytes in the budget and are 4 here: these models are float32.
    left = {k: v for k, v in same.plan.layers.items() if k not in mixed.plan.layers}
    layers = packed_layers(same.denoiser)
    size -= sum(2 * np.prod(matrix_shape(layers[name])) for name in left)
    assert 0.9 * limit < size <= limit
    assert len({spec.weight.format for spec in mixed.plan.layers.values()}) > 1
    assert np.isfinite(MODELS[name].call(mixed)).all()


def test_static_layers_that_see_prompts_keep_the_first_token(model_folders) -> None:
    pipe = DQPipeline.from_pretrained(model_folders("sd32"), recipe(float_share=0.0))
    roles = family_of(pipe.unet).roles(pipe.unet)
    for name, spec in pipe.plan.layers.items():
        assert bool(spec.kept_every) is (roles[name] is Role.CROSS_KV)


@pytest.mark.parametrize("name", ["dit64", "pixart64"])
def test_models_without_such_a_token_say_so_and_go_on(model_folders, name: str) -> None:
    pipe = DQPipeline.from_pretrained(model_folders(name), recipe())
    (note,) = pipe.plan.notes.values()
    assert "no begin-of-sentence token to keep" in note
    assert "no begin-of-sentence token to keep" in pipe.summary()


def test_it_is_saved_and_reloaded(model_folders, tmp_path: Path) -> None:
    pipe = DQPipeline.from_pretrained(model_folders("sd32"), recipe())
    before = MODELS["sd32"].call(pipe)
    pipe.save_pretrained(tmp_path / "packed")
    again = DQPipeline.from_pretrained(tmp_path / "packed")
    assert again.recipe == recipe()
    assert np.array_equal(MODELS["sd32"].call(again), before)


def test_images_of_held_out_prompts_decide(model_folders, caplog) -> None:
    settings = {"held_out": 4, "quality": (1.0, 8.0, 1000.0), "weight_bits": 3}
    with caplog.at_level(logging.INFO, logger="dq"):
        pipe = DQPipeline.from_pretrained(model_folders("sd32"), recipe(**settings))
    lines = [r.message for r in caplog.records if "held-out images" in r.message]
    assert len(lines) > 1
    reached = {line.partition(":")[0]: float(line.split()[3]) for line in lines}
    best = max(reached, key=reached.__getitem__)
    only = (float(best.removeprefix("quality x ")),)
    alone = DQPipeline.from_pretrained(
        model_folders("sd32"), recipe(**{**settings, "quality": only})
    )
    assert alone.plan == pipe.plan
    assert not any(isinstance(m, QuantLayer) for m in pipe.unet.modules())


def test_another_budget_takes_over_the_table(cache: Path) -> None:
    method = dataclasses.replace(QUICK, share=0.5)
    sizes = []
    for bits in (4, 5):
        model = network("dit64")
        plan = quantize(
            model, Recipe("r", (dataclasses.replace(method, weight_bits=bits),)), Samples(model, 1)
        )
        sizes.append(Counter(spec.weight.format for spec in plan.layers.values()))
        (folder,) = cache.iterdir()
        times = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
        if bits == 4:
            before = times
    assert times == before  # nothing was measured again
    assert sizes[0] != sizes[1]
    other = network("dit64")
    other.proj_out_1.bias.data.add_(1)
    quantize(other, Recipe("r", (method,)), Samples(other, 1))
    assert len(list(cache.iterdir())) == 2


def test_the_same_table_and_budget_give_the_same_plan() -> None:
    plans = []
    for _ in range(2):
        model = network("dit64")
        plans.append(quantize(model, recipe(share=0.5), Samples(model, 1)).to_dict())
    assert plans[0] == plans[1]


def test_the_papers_objective_and_its_ssim(model_folders) -> None:
    paper = recipe(objective="paper", share=0.5, content="ssim", float_share=0.0)
    pipe = DQPipeline.from_pretrained(model_folders("sd32"), paper)
    assert len({spec.weight.format for spec in pipe.plan.layers.values()}) > 1
    with pytest.raises(DQError, match="SSIM and noise cannot be added up"):
        MixDQ(content="ssim")


def test_time_can_be_limited_and_layers_forced(model_folders) -> None:
    asked = recipe(max_time=50.0, forced=("*.ff.net.*=int8|*",))
    pipe = DQPipeline.from_pretrained(model_folders("sd32"), asked)
    forced = [s for n, s in pipe.plan.layers.items() if ".ff.net." in n]
    assert forced
    assert {spec.weight.format for spec in forced} == {"int8"}


def test_float_inputs_leave_weights_only(model_folders) -> None:
    wanted = Recipe.get("mixdq-w4a16")
    method = dataclasses.replace(wanted.steps[0], share=0.0, steps=1, held_out=0)
    pipe = DQPipeline.from_pretrained(
        model_folders("sd32"), dataclasses.replace(wanted, steps=(method,), calibration=SHORT)
    )
    assert all(spec.input is None for spec in pipe.plan.layers.values())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mixdq-w4a8", {"weight_bits": 4, "inputs": ("int8",), "megabytes": 0.0}),
        ("mixdq-w5a8", {"weight_bits": 5, "inputs": ("int8",)}),
        ("mixdq-w8a8", {"weight_bits": 8, "inputs": ("int8",)}),
        ("mixdq-w4a16", {"weight_bits": 4, "inputs": ()}),
        ("mixdq-w3a6", {"weight_bits": 3, "inputs": ("int6",), "run_inputs": ("int6",)}),
        ("mixdq-2.75mb-a8", {"megabytes": 2.75, "inputs": ("int8",)}),
    ],
)
def test_names(name: str, settings: dict) -> None:
    (step,) = Recipe.get(name).steps
    assert {key: getattr(step, key) for key in settings} == settings
    assert Recipe.from_dict(Recipe.get(name).to_dict()) == Recipe.get(name)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"objective": "dB"}, "unknown objective 'dB'"),
        ({"dynamic": "yes"}, "unknown value of dynamic"),
        ({"quality": ()}, "quality lists weights above 0"),
        ({"quality": (1.0, 0.0)}, "quality lists weights above 0"),
        ({"forced": ("conv_in",)}, "forced takes 'pattern=weight|input'"),
        ({"steps": 0}, "a sensitivity needs steps of 1 or more"),
        ({"share": 1.5}, "share is a part of the layers, 0 to 1"),
    ],
)
def test_other_settings_are_errors(settings: dict, text: str) -> None:
    with pytest.raises(DQError, match=text):
        MixDQ(**settings)


def test_it_needs_something_that_runs() -> None:
    with pytest.raises(NeedsData, match="needs calibration data"):
        decide(network("dit64"), recipe())


def test_an_impossible_budget_leaves_the_model_as_it_was(model_folders) -> None:
    pipe = DQPipeline.from_pretrained(model_folders("sd32"))
    before = MODELS["sd32"].call(pipe)
    with pytest.raises(DQError, match="is possible"):
        pipe.quantize(recipe(megabytes=0.001))
    assert np.array_equal(MODELS["sd32"].call(pipe), before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["emoji-unet", "emoji-dit"])
@torch.no_grad()
def test_it_is_clearly_ahead_of_uniform_bits(name: str) -> None:
    """At equal bytes and with the same quantizers, by 2 dB of the denoiser's output and more."""
    full = DQPipeline.from_pretrained(FOLDERS[name])
    source = PipelineSource(full)
    spec = source.held_out(CalibrationSpec(steps=4), 8)
    (calls,) = Calibration(full.denoiser, source, spec).batches()
    reached = []
    for asked in ("w4a8", "mixdq-w4a8"):
        pipe = DQPipeline.from_pretrained(FOLDERS[name], asked)
        noise = power = 0.0
        for call in calls:
            y = full.denoiser(**call, return_dict=False)[0]
            noise += float((pipe.denoiser(**call, return_dict=False)[0] - y).square().sum())
            power += float(y.square().sum())
        reached.append(10 * np.log10(power / noise))
    assert reached[1] > reached[0] + 2
