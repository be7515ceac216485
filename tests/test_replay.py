"""Replay of the denoiser's calls, on tiny pipelines of all architectures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dq import DQPipeline
from dq.distance import sqnr
from dq.pipelines.gallery import Settings
from dq.scoring.replay import captured, outputs
from tests.models import MODELS

SETTINGS = Settings(("7", "8", "9"), steps=2, batch=2, guidance=1.0)


@pytest.mark.parametrize("name", [*MODELS])
def test_full_precision_equals_itself(name: str, model_folders: Callable[[str], Path]) -> None:
    pipe = DQPipeline.from_pretrained(model_folders(name))
    calls = captured(pipe, SETTINGS)
    exact = outputs(pipe, calls)
    assert exact.ndim == 1
    assert sqnr(outputs(pipe, calls), exact) > 100  # reductions of matrices may vary in order
    fine = DQPipeline.from_pretrained(model_folders(name), "w8a16")
    coarse = DQPipeline.from_pretrained(model_folders(name), "w3a16")
    near, far = (sqnr(outputs(other, calls), exact) for other in (fine, coarse))
    assert near > far + 10


def test_guidance_is_that_of_the_images(model_folders: Callable[[str], Path]) -> None:
    pipe = DQPipeline.from_pretrained(model_folders("sd32"))
    (alone, last), (both, _) = (
        [call["sample"].shape[0] for call in captured(pipe, settings)[::2]]
        for settings in (SETTINGS, Settings(SETTINGS.prompts, steps=2, batch=2, guidance=3.0))
    )
    assert (alone, last, both) == (2, 1, 4)
