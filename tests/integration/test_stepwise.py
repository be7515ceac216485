"""Checkpoints whose layers depend on the timestep, as users load, copy and compile them."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from dq import DQPipeline
from dq.calls import run
from dq.family import family_of
from dq.nn import packed_layers
from dq.pipelines.footprint import footprint
from dq.recipe import Recipe
from tests.models.parts import finish
from tests.packed import CASES, same_state

RECIPE = Recipe.from_dict(
    {
        "name": "stepwise",
        "steps": [
            {"method": "ptq", "weights": "int8", "inputs": "int8", "dynamic": "static"},
            {"method": "temporal", "treatment": "cache"},
            {"method": "step-groups", "groups": 2},
            {"method": "ptqd", "groups": 2},
        ],
        "calibration": {"n": 2, "steps": 4, "batch": 2},
    }
)
NAMES = ["sd32", "sdxl", "dit64", "pixart64", "flux"]
each = pytest.mark.parametrize("name", NAMES)
TIMES = {"flux": (0.9, 0.2), "sd32": (751, 100)}


@pytest.fixture(scope="module")
def packed(
    tmp_path_factory: pytest.TempPathFactory, model_folders: Callable[[str], Path]
) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            DQPipeline.from_pretrained(model_folders(name), RECIPE).save_pretrained(folders[name])
        return folders[name]

    return folder


def load(name: str, folder: Path) -> nn.Module:
    return CASES[name].network(finish(DiffusionPipeline.from_pretrained(folder)))


def inputs(model: nn.Module, name: str, which: int, rows: int = 1) -> dict[str, Any]:
    made = family_of(model).sample_inputs(model, rows, torch.Generator().manual_seed(0))
    now = TIMES.get(name, (751, 100))[which]
    like = made["timestep"]
    return {**made, "timestep": torch.full_like(like, now)}


def output(model: nn.Module, call: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return run(model, call)


@each
def test_what_is_stored_is_counted_and_read_back(name: str, packed: Callable[[str], Path]) -> None:
    model, other = (load(name, packed(name)) for _ in range(2))
    assert same_state(model, other)
    count = footprint(model)
    assert count.stored_bytes == count.planned_bytes
    for which in (0, 1):
        call = inputs(model, name, which)
        assert torch.equal(output(model, call), output(other, call))


@each
def test_rows_at_two_timesteps_are_those_of_two_calls(
    name: str, packed: Callable[[str], Path]
) -> None:
    model = load(name, packed(name))
    calls = [inputs(model, name, which, rows=2) for which in (0, 1)]
    mixed = dict(calls[0])
    one, two = (c["timestep"].reshape(-1)[:1] for c in calls)
    mixed["timestep"] = torch.cat([one, two])
    together = output(model, mixed)
    for row, call in enumerate(calls):
        alone, other = (output(model, c)[row] for c in (call, calls[1 - row]))
        # Other batches add up in another order, so that codes next to a tie fall to another side.
        assert (together[row] - alone).norm() < 0.05 * alone.norm()
        assert (together[row] - alone).norm() < 0.5 * (together[row] - other).norm()


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", ["sd32", "dit64"])
def test_compiled_it_follows_the_timestep(
    name: str, whole: bool, packed: Callable[[str], Path]
) -> None:
    torch._dynamo.reset()
    pipe = finish(DQPipeline.from_pretrained(packed(name)))
    model = pipe.denoiser
    calls = [inputs(model, name, which, rows=2) for which in (0, 1, 0)]
    expected = [output(model, call) for call in calls]
    if whole:
        model.compile(fullgraph=True)
    else:
        pipe.compile_blocks()
    with torch._dynamo.config.patch(error_on_recompile=False):
        for call, wanted in zip(calls, expected, strict=True):
            found = output(model, call)
            # Codes next to a tie may fall to the other side: the compiler fuses differently.
            assert (found - wanted).norm() < 0.02 * wanted.norm()


@each
def test_copies_and_float_again(name: str, packed: Callable[[str], Path]) -> None:
    model = load(name, packed(name))
    other = copy.deepcopy(model)
    first, second = (inputs(model, name, which) for which in (0, 1))
    expected = output(model, first)
    output(other, second)
    assert torch.equal(output(model, first), expected)
    assert torch.equal(output(other, first), expected)
    model.dequantize()
    assert not packed_layers(model)
    assert not model._forward_pre_hooks
    assert torch.isfinite(output(model, first)).all()
