"""What names cost in the files of small models whose weights have one bit."""

import dataclasses
from pathlib import Path

import pytest

from dq import DQPipeline
from dq.calibrate import CalibrationSpec
from dq.checkpoints import path
from dq.methods.binarydm import BinaryDM
from dq.recipe import Recipe


def hurried(name: str) -> Recipe:
    """A recipe as users call it, but for the training: what is stored does not depend on it."""
    recipe = Recipe.get(name)
    *before, last = recipe.steps
    assert isinstance(last, BinaryDM)
    last = dataclasses.replace(last, steps=1, batch=2)
    calibration = CalibrationSpec(n=2, steps=2, batch=2)
    return dataclasses.replace(recipe, steps=(*before, last), calibration=calibration)


@pytest.mark.parametrize("recipe", ["binarydm-w1a8", "binarydm-w1a16"])
@pytest.mark.parametrize("name", ["emoji-unet", "emoji-dit"])
def test_files_are_within_3_percent_of_the_counted_bits(
    name: str, recipe: str, tmp_path: Path
) -> None:
    pipe = DQPipeline.from_pretrained(path(name), hurried(recipe))
    pipe.denoiser.save_pretrained(tmp_path)
    counted = pipe.footprint().planned_bytes
    (file,) = tmp_path.glob("*.safetensors")
    assert counted < file.stat().st_size < 1.03 * counted
