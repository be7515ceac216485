"""Calibration on a folder of images: what the denoiser is shown instead of what is being drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dq import DQPipeline
from dq.calibrate import Calibration, CalibrationSpec
from dq.calls import Call
from dq.errors import DQError
from dq.methods.ptq import PTQ
from dq.pipelines.draw import PipelineSource
from dq.pipelines.noised import caption_of, folder_files
from dq.recipe import Recipe

COLOURS = {"a_red_square.png": "red", "blue.png": "blue", "deep/green.jpg": "green"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("images")
    (made / "deep").mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (90, 70), colour).save(made / name)
    (made / "blue.txt").write_text("the sea\n")
    return made


def calls(pipe: Any, folder: Path, **settings: Any) -> list[Call]:
    spec = CalibrationSpec(**{"n": 3, "steps": 4, "batch": 3, "folder": str(folder), **settings})
    source = PipelineSource(pipe)
    return [call for batch in Calibration(pipe.denoiser, source, spec).batches() for call in batch]


def noisy(call: Call) -> Tensor:
    """The noisy images of a call, without those of guidance."""
    found: Tensor = next(iter(call.values())) if "sample" not in call else call["sample"]
    return found[-3:]


def test_captions_are_beside_the_image_or_its_name(folder: Path) -> None:
    files = folder_files(str(folder))
    assert [caption_of(file) for file in files] == ["a red square", "the sea", "green"]


@pytest.mark.parametrize("name", ["sd32", "sdxl", "sd3"])
def test_noise_falls_from_step_to_step(name: str, folder: Path, model_folders: Any) -> None:
    pipe = DQPipeline.from_pretrained(model_folders(name))
    found = calls(pipe, folder)
    assert len(found) == 4
    last = noisy(found[-1])
    # All steps mix the same image with the same noise: they lie on a line.
    whole = torch.stack([noisy(call).flatten() for call in found])
    _, strength, _ = torch.linalg.svd(whole.double(), full_matrices=False)
    assert strength[2] < 1e-4 * strength[0]
    clean = _clean(pipe, folder, last)
    pairs = [torch.stack([noisy(call).flatten(), clean]) for call in found]
    likeness = [float(torch.corrcoef(pair)[0, 1]) for pair in pairs]
    assert likeness == sorted(likeness)
    assert likeness[-1] > likeness[0] + 0.05


def _clean(pipe: Any, folder: Path, like: Tensor) -> Tensor:
    """The latents of the images, written anew."""
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    size = (like.shape[3] * factor, like.shape[2] * factor)
    pixels = torch.stack([
        torch.from_numpy(np.array(Image.open(f).resize(size))).permute(2, 0, 1) / 127.5 - 1
        for f in folder_files(str(folder))
    ])  # fmt: skip
    with torch.no_grad():
        return pipe.vae.encode(pixels).latent_dist.mode().flatten()


def test_both_halves_of_guidance_see_the_same_image(folder: Path, model_folders: Any) -> None:
    pipe = DQPipeline.from_pretrained(model_folders("sd32"))
    for call in calls(pipe, folder):
        assert len(call["sample"]) == 6
        assert torch.equal(call["sample"][:3], call["sample"][3:])


def test_classes_go_with_images_too(folder: Path, model_folders: Any) -> None:
    pipe = DQPipeline.from_pretrained(model_folders("dit64"))
    found = calls(pipe, folder, prompts=("7", "8", "9"))
    assert found[0]["hidden_states"].shape[0] in (3, 6)


def test_held_out_images_are_others(folder: Path, model_folders: Any) -> None:
    pipe = DQPipeline.from_pretrained(model_folders("sd32"))
    source = PipelineSource(pipe)
    spec = CalibrationSpec(n=1, steps=2, folder=str(folder))
    other = source.held_out(spec, 1)
    assert (other.first, other.folder) == (1, spec.folder)
    own, others = (source.identity(s)["prompts"] for s in (spec, other))
    assert (own, others) == (["a red square"], ["the sea"])


def test_other_images_or_another_autoencoder_are_another_job(
    folder: Path, model_folders: Any
) -> None:
    pipe: Any = DQPipeline.from_pretrained(model_folders("sd32"))
    spec = CalibrationSpec(n=1, steps=2, folder=str(folder))
    found = [PipelineSource(pipe).identity(spec)]
    file = sorted(folder.glob("*.png"))[0]
    Image.new("RGB", Image.open(file).size, "black").save(file)
    found.append(PipelineSource(pipe).identity(spec))
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.mul_(0.5)
    found.append(PipelineSource(pipe).identity(spec))
    assert found[0] != found[1] != found[2]


@pytest.mark.parametrize("name", ["flux", "amused"])
def test_other_latents_are_refused(name: str, folder: Path, model_folders: Any) -> None:
    pipe = DQPipeline.from_pretrained(model_folders(name))
    with pytest.raises(DQError, match="leave out the folder of images"):
        calls(pipe, folder)


def test_an_empty_folder_is_refused(tmp_path: Path, model_folders: Any) -> None:
    pipe = DQPipeline.from_pretrained(model_folders("sd32"))
    with pytest.raises(DQError, match="holds no images"):
        calls(pipe, tmp_path)


def test_a_recipe_may_name_the_folder(folder: Path, model_folders: Any) -> None:
    values = {
        "steps": [{"method": "ptq", "inputs": "int8", "dynamic": "static"}],
        "calibration": {"n": 2, "steps": 2, "folder": str(folder)},
    }
    recipe = Recipe.from_dict(values)
    assert recipe == Recipe("custom", (PTQ("int8", "int8", "static"),), recipe.calibration)
    seen, drawn = (
        DQPipeline.from_pretrained(
            model_folders("sd32"),
            Recipe("t", recipe.steps, CalibrationSpec(n=2, steps=2, folder=f)),
        )
        for f in (str(folder), "")
    )
    ranges = [pipe.denoiser.conv_in.input_affine for pipe in (seen, drawn)]
    assert not torch.equal(*ranges)
