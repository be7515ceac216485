"""Recipes of floating-point formats: what their names say, on every family."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dq import DQConfig, DQError
from dq.engine import decide, quantize
from dq.family import SMALLEST, Role, family_of, quantizable
from dq.methods import fp
from dq.methods.bos import BOS
from dq.nn import matrix_shape, packed_layers
from dq.nn.layers import input_channels
from dq.plan import Plan
from dq.recipe import Recipe
from tests.models import MODELS
from tests.packed import forward, relative_error, same_state
from tests.sources import Samples

NETWORKS = {name: case.network(case.build()) for name, case in MODELS.items()}
WIDE = (Role.IO, Role.TIME)

E4M3, BY_TOKEN, CALIBRATED = "e4m3 channel", "e4m3 token dynamic", "e4m3 tensor"
NVFP4, MXFP4 = "e2m1 group16 e4m3 scales", "e2m1 group32 e8m0 scales"
MXFP6, MXFP8 = "e2m3 group32 e8m0 scales", "e4m3 group32 e8m0 scales"
# Name: weights and inputs, of all layers but those that are kept wide.
FORMS: dict[str, tuple[str, str | None]] = {
    "fp8": (E4M3, BY_TOKEN),
    "fp8-static": (E4M3, CALIBRATED),
    "fp8-w8a16": (E4M3, None),
    "fp4-w4a8": ("e2m1 channel", BY_TOKEN),
    "fp4-w4a8-static": ("e2m1 channel", CALIBRATED),
    "fp4-w4a8-g32": ("e2m1 group32", BY_TOKEN),
    "fp4-w4a8-g16-static": ("e2m1 group16", CALIBRATED),
    "fp4-w4a16": ("e2m1 channel", None),
    "fp4-w4a16-g16": ("e2m1 group16", None),
    "nvfp4": (NVFP4, "e2m1 group16 dynamic e4m3 scales nearest"),
    "nvfp4-a8": (NVFP4, BY_TOKEN),
    "nvfp4-a16": (NVFP4, None),
    "mxfp4": (MXFP4, "e2m1 group32 dynamic e8m0 scales rceil"),
    "mxfp4-a8": (MXFP4, BY_TOKEN),
    "mxfp4-a16": (MXFP4, None),
    "mxfp6": (MXFP6, "e2m3 group32 dynamic e8m0 scales rceil"),
    "mxfp6-a8": (MXFP6, BY_TOKEN),
    "mxfp6-a16": (MXFP6, None),
    "mxfp8": (MXFP8, "e4m3 group32 dynamic e8m0 scales rceil"),
    "mxfp8-a16": (MXFP8, None),
}
DATA_FREE = [f"{name}-rtn" for name in FORMS if "static" not in name]


def first_step(model: nn.Module, recipe: str) -> Plan:
    """What the formats are; later steps ask for data."""
    wanted = Recipe.get(recipe)
    return decide(model, dataclasses.replace(wanted, steps=wanted.steps[:1]))


def test_every_recipe_is_looked_at() -> None:
    assert {name for name, *_ in fp._RECIPES} <= FORMS.keys()
    steps = {name: Recipe.get(name).steps[0] for name in FORMS}
    assert len({*steps.values()}) == len(steps)  # no two names for one thing


@pytest.mark.parametrize("recipe", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_every_family_has_the_formats_that_the_name_says(name: str, recipe: str) -> None:
    model = NETWORKS[name]
    layers, family = quantizable(model), family_of(model)
    roles, splits = family.roles(model), family.splits(model)
    weight, low = FORMS[recipe]
    plan = first_step(model, recipe)
    narrow = 0
    for layer, module in layers.items():
        rows, columns = matrix_shape(module)
        if rows * columns < SMALLEST:
            assert layer not in plan.layers
            continue
        spec = plan.layers[layer]
        wide = roles[layer] in WIDE or layer in plan.notes
        assert str(spec.weight) == (E4M3 if wide else weight)
        wide_low = CALIBRATED if low == CALIBRATED else BY_TOKEN
        expected = None if low is None else wide_low if wide else low
        assert (None if spec.input is None else str(spec.input)) == expected
        assert spec.input_splits == (splits.get(layer, ()) if expected == CALIBRATED else ())
        assert spec.bytes(rows, columns) < 2 * rows * columns
        narrow += not wide
    assert narrow > 5
    assert plan.is_static() is ("static" in recipe)
    assert decide(model, Recipe.get("fp8")).layers.keys() == plan.layers.keys()
    # Groups with float32 scales are for comparison; everything else some hardware multiplies.
    assert all(s.weight.is_deployable for s in plan.layers.values()) is ("-g" not in recipe)


@pytest.mark.parametrize("recipe", ["fp4-w4a8-g64", "fp4-w4a16-g128", "fp4-w4a8-g64-static"])
@pytest.mark.parametrize("name", MODELS)
def test_layers_that_groups_do_not_fit_have_eight_bits(name: str, recipe: str) -> None:
    model = NETWORKS[name]
    layers, roles = quantizable(model), family_of(model).roles(model)
    plan = first_step(model, recipe)
    size = 128 if "g128" in recipe else 64
    misfits = 0
    for layer, spec in plan.layers.items():
        columns = matrix_shape(layers[layer])[1]
        if roles[layer] in WIDE:
            assert str(spec.weight) == E4M3
        elif columns % size:
            misfits += 1
            assert str(spec.weight) == E4M3
            text = f"has 8-bit weights: group size {size} does not divide {columns} input features"
            assert text in plan.notes[layer]
        else:
            assert str(spec.weight) == f"e2m1 group{size}"
            assert layer not in plan.notes
    assert misfits or name in ("sd64", "dit64")


@pytest.mark.parametrize("recipe", ["nvfp4-rtn", "mxfp4-rtn", "mxfp8", "mxfp6-a8"])
def test_layers_that_blocks_do_not_fit_have_e4m3(recipe: str) -> None:
    """Of these a weight of 3 x 3 pixels has blocks, and its input has not."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(40, 64),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=72,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    layers, roles = quantizable(model), family_of(model).roles(model)
    weight, low = FORMS[recipe.removesuffix("-rtn")]
    plan = decide(model, Recipe.get(recipe))
    kinds = set()
    for layer, spec in plan.layers.items():
        if roles[layer] in WIDE:
            continue
        columns, channels = matrix_shape(layers[layer])[1], input_channels(layers[layer])
        block = 16 if "nvfp4" in recipe else 32
        fit = columns % block == 0, channels % block == 0 or low == BY_TOKEN
        kinds.add(fit)
        assert str(spec.weight) == (weight if all(fit) else E4M3)
        assert str(spec.input) == (low if all(fit) else BY_TOKEN)
        assert (layer in plan.notes) is not all(fit)
    assert (True, True) in kinds
    assert (False, False) in kinds or low == BY_TOKEN
    quantize(model, Recipe.get(recipe))  # and it runs
    assert torch.isfinite(forward(model)).all()


@pytest.mark.parametrize("recipe", [name for name in FORMS if "static" in name])
def test_static_inputs_keep_the_first_token_of_prompts(recipe: str) -> None:
    steps = Recipe.get(recipe).steps
    assert BOS() in steps
    assert BOS() not in Recipe.get(recipe.replace("-static", "")).steps
    model = MODELS["sd32"].network(MODELS["sd32"].build())
    with pytest.raises(DQError, match="needs calibration data, and only the denoiser was given"):
        quantize(model, Recipe.get(recipe))


@pytest.mark.parametrize(
    "name",
    ["fp8-a8", "fp8-a16", "fp8-g32", "mxfp8-a8", "nvfp4-static", "nvfp4-g16", "fp4", "mxfp5"],
)
def test_what_makes_no_sense_is_no_recipe(name: str) -> None:
    with pytest.raises(DQError, match=f"unknown recipe '{name}'"):
        Recipe.get(name)


# Relative errors of the outputs of networks with random weights, which lose more than trained ones.
MOST = {"fp8": 0.15, "mxfp8": 0.17, "mxfp6": 0.17, "fp4": 0.4, "nvfp4": 0.45, "mxfp4": 0.6}


WANTED = {name: forward(NETWORKS[name]) for name in ("sd32", "dit64")}


def loaded(name: str, recipe: str, folder: Path) -> Any:
    """Load the denoiser alone, by diffusers' own call."""
    config = DQConfig(recipe)
    kind: Any = type(NETWORKS[name])
    subfolder = MODELS[name].denoiser
    return kind.from_pretrained(folder, subfolder=subfolder, quantization_config=config)


@pytest.mark.parametrize("recipe", DATA_FREE)
def test_those_without_data_load_through_diffusers(
    recipe: str, model_folders: Callable[[str], Path]
) -> None:
    model = loaded("dit64", recipe, model_folders("dit64"))
    plan = model.config["quantization_config"].plan
    assert plan == decide(NETWORKS["dit64"], Recipe.get(recipe))
    assert packed_layers(model).keys() == plan.layers.keys()
    error = relative_error(forward(model), WANTED["dit64"])
    assert 0.001 < error < MOST[recipe.split("-")[0]] / 3


# Random convolutions lose more; and they differ from linears in how they are stored.
@pytest.mark.parametrize("name", ["sd32", "dit64"])
@pytest.mark.parametrize("recipe", ["fp8-rtn", "fp4-w4a8-rtn", "nvfp4-rtn", "mxfp4-rtn"])
def test_loaded_in_place_and_saved_they_are_the_same(
    name: str, recipe: str, model_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    model = loaded(name, recipe, model_folders(name))
    in_place = MODELS[name].network(MODELS[name].build())
    quantize(in_place, Recipe.get(recipe))
    assert same_state(model, in_place)
    y = forward(model)
    assert 0.001 < relative_error(y, WANTED[name]) < MOST[recipe.split("-")[0]]
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert same_state(again, model)
    assert torch.equal(forward(again), y)


@pytest.mark.parametrize("recipe", ["fp8", "nvfp4-rtn", "mxfp4-rtn", "mxfp6", "mxfp8"])
def test_inputs_of_fewer_bits_cost_quality_and_none_cost_least(recipe: str) -> None:
    case = MODELS["dit64"]
    expected = WANTED["dit64"]
    errors = []
    base, _, end = recipe.partition("-")
    wider = ["fp8-w8a16"] if base == "fp8" else [f"{base}-a16-{end}".rstrip("-")]
    for each in (*wider, recipe):
        model = case.network(case.build())
        quantize(model, Recipe.get(each), Samples(model, 1))
        errors.append(relative_error(forward(model), expected))
    assert errors == sorted(errors)
