"""Drawing: batches do not change images, prompts suit the pipeline."""

import numpy as np
import pytest
from diffusers import DiffusionPipeline

from dq.calibrate import CalibrationSpec
from dq.errors import DQError
from dq.pipelines.draw import PipelineSource, default_prompts, draw
from dq.pipelines.prompts import PROMPTS
from tests.models import MODELS, ModelCase


def test_every_pipeline_draws_its_default_prompts(
    model_case: ModelCase, model_pipe: DiffusionPipeline
) -> None:
    prompts = default_prompts(model_pipe)[:3]
    images = draw(model_pipe, prompts, seeds=[1, 2, 3], steps=1, batch=2, output_type="np")
    assert len(images) == 3
    assert all(np.isfinite(image).all() and image.std() > 0 for image in images)
    assert not np.array_equal(images[0], images[1])


def test_an_image_does_not_depend_on_its_batch(model_pipe: DiffusionPipeline) -> None:
    prompts = default_prompts(model_pipe)[:3]
    options = {"steps": 2, "output_type": "np"}
    together = draw(model_pipe, prompts, seeds=[7, 8, 9], batch=3, **options)
    alone = draw(model_pipe, prompts[2:], seeds=[9], batch=1, **options)
    assert np.abs(together[2] - alone[0]).max() < 1e-4


def test_progress_bar_settings_are_restored() -> None:
    pipe = MODELS["sd32"].build()
    pipe.set_progress_bar_config(desc="mine")
    draw(pipe, ["a fox"], seeds=[0], steps=1, output_type="latent")
    assert pipe._progress_bar_config == {"desc": "mine"}


def test_classes_are_checked() -> None:
    pipe = MODELS["dit64"].build()
    with pytest.raises(DQError, match="unknown class of this model 'foxx'"):
        draw(pipe, ["foxx"], seeds=[0], steps=1)


def test_default_prompts_of_text_pipelines() -> None:
    assert default_prompts(MODELS["sd32"].build()) == PROMPTS
    assert len(set(PROMPTS)) == 64


@pytest.mark.parametrize(("n", "batch", "batches"), [(1, 8, 1), (8, 8, 1), (9, 8, 2)])
def test_source_counts_batches(n: int, batch: int, batches: int) -> None:
    source = PipelineSource(MODELS["sd32"].build())
    assert source.batches(CalibrationSpec(n=n, batch=batch)) == batches


@pytest.mark.parametrize("name", ["sd32", "dit64", "pixart64", "sd3", "flux"])
def test_images_of_another_size(name: str) -> None:
    pipe = MODELS[name].build()
    prompts = default_prompts(pipe)[:1]
    before = dict(getattr(pipe, MODELS[name].denoiser).config)
    (image,) = draw(pipe, prompts, seeds=[0], steps=1, output_type="np", size=(64, 64))
    assert image.shape == (64, 64, 3)
    assert dict(getattr(pipe, MODELS[name].denoiser).config) == before


@pytest.mark.parametrize(
    ("name", "size", "text"),
    [
        ("dit64", (64, 32), "takes no height and width, square images of any size"),
        ("sd32", (9, 64, 64), "takes no num_frames"),
        ("sd32", (64,), "a size is"),
        ("sd32", (64, 0), "a size is"),
        ("sd32", (64, 60), "of StableDiffusionPipeline are multiples of 8, not"),
        ("dit64", (66, 66), "of DiTPipeline are multiples of 4, not"),
    ],
)
def test_sizes_that_a_pipeline_does_not_take(name: str, size: tuple[int, ...], text: str) -> None:
    pipe = MODELS[name].build()
    with pytest.raises(DQError, match=text):
        draw(pipe, default_prompts(pipe)[:1], seeds=[0], steps=1, size=size)


@pytest.mark.parametrize("numbers", [{"steps": 0}, {"steps": 1, "batch": 0}, {"steps": -2}])
def test_nothing_to_draw_is_refused(numbers: dict[str, int]) -> None:
    pipe = MODELS["sd32"].build()
    with pytest.raises(DQError, match="each is 1 or more"):
        draw(pipe, default_prompts(pipe)[:1], seeds=[0], **numbers)
