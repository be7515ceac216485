"""The tiny pipelines are real: they run, repeat, save and reload to the same images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from tests.models import MODELS, PROMPT, ModelCase, aligned

# Denoiser parameters; linears, those whose inputs divide by 32; convolutions, likewise.
STRUCTURE = {
    "sd32": (985_444, 50, 50, 33, 32),
    "sd64": (3_918_532, 50, 50, 33, 32),
    "sdxl": (1_982_660, 148, 148, 35, 34),
    "dit64": (330_208, 20, 20, 1, 0),
    "pixart64": (188_640, 26, 26, 1, 0),
    "sd3": (79_696, 32, 32, 1, 0),
    "flux": (68_484, 28, 27, 0, 0),
    "amused": (242_848, 55, 54, 6, 6),
}


def test_runs_two_steps(model_case: ModelCase, model_pipe: DiffusionPipeline) -> None:
    image = model_case.call(model_pipe, seed=0)
    assert image.shape == (1, 32, 32, 3)
    assert np.isfinite(image).all()
    assert image.std() > 0.01, "an image without contrast hides every quantization error"
    # Saturated pixels hide differences too.
    assert ((image > 0) & (image < 1)).mean() > 0.9


def test_builds_the_same_weights(model_case: ModelCase, model_pipe: DiffusionPipeline) -> None:
    state = torch.get_rng_state()
    again = model_case.network(model_case.build()).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    for name, tensor in model_case.network(model_pipe).state_dict().items():
        assert torch.equal(tensor, again[name]), name


def test_seed_and_condition_matter(model_case: ModelCase, model_pipe: DiffusionPipeline) -> None:
    image = model_case.call(model_pipe, seed=0)
    assert np.array_equal(image, model_case.call(model_pipe, seed=0))
    assert not np.array_equal(image, model_case.call(model_pipe, seed=1))
    if "prompt" in model_case.arguments:
        other = model_case.call(model_pipe, seed=0, prompt=f"not {PROMPT}")
    else:
        other = model_case.call(model_pipe, seed=0, class_labels=[8])
    assert not np.array_equal(image, other)


def test_reloads_identically(
    model_case: ModelCase, model_pipe: DiffusionPipeline, model_folder: Path
) -> None:
    reloaded = aligned(DiffusionPipeline.from_pretrained(model_folder))
    reloaded.set_progress_bar_config(disable=True)
    assert type(reloaded) is type(model_pipe)
    expected = model_case.call(model_pipe, seed=3)
    assert np.array_equal(model_case.call(reloaded, seed=3), expected)


@pytest.mark.parametrize("name", MODELS)
def test_structure(name: str) -> None:
    case = MODELS[name]
    network = case.network(case.build())
    linears = [m.in_features for m in network.modules() if isinstance(m, nn.Linear)]
    convs = [m.in_channels for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert STRUCTURE[name] == (
        sum(p.numel() for p in network.parameters()),
        len(linears),
        sum(n % 32 == 0 for n in linears),
        len(convs),
        sum(n % 32 == 0 for n in convs),
    )


def test_latents_can_be_asked_for() -> None:
    shapes = {"flux": (1, 64, 4), "amused": (1, 8, 8)}  # the second are codes
    for name in MODELS.keys() - {"dit64"}:
        case = MODELS[name]
        latents = case.call(case.build(), seed=0, output_type="latent")
        assert latents.shape == shapes.get(name, (1, 4, 16, 16))
