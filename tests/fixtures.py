"""Fixtures over the tiny pipelines; `tests/conftest.py` takes them as a pytest plugin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline

from dq import DQPipeline
from tests.models import MODELS, ModelCase
from tests.packed import FOLDERS, RECIPES

__all__ = ["model_case", "model_folder", "model_folders", "model_pipe", "packed_folders"]


@pytest.fixture(params=[*MODELS])
def model_case(request: pytest.FixtureRequest) -> ModelCase:
    """Each tiny model in turn; `parametrize("model_case", ["sd32"], indirect=True)` chooses."""
    return MODELS[request.param]


@pytest.fixture
def model_pipe(model_case: ModelCase) -> DiffusionPipeline:
    """A new pipeline of `model_case`, free to be changed: building takes 10 to 50 milliseconds."""
    return model_case.build()


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Maps a name in `CASES` to its saved folder, written once a session. Read-only, please."""
    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name in FOLDERS:
            return FOLDERS[name]
        if name not in folders:
            path = tmp_path_factory.mktemp(f"model-{name}", numbered=False)
            MODELS[name].build().save_pretrained(path)
            folders[name] = path
        return folders[name]

    return folder


@pytest.fixture
def model_folder(model_case: ModelCase, model_folders: Callable[[str], Path]) -> Path:
    """The saved folder of `model_case`. Read-only, please."""
    return model_folders(model_case.name)


@pytest.fixture(scope="session")
def packed_folders(
    tmp_path_factory: pytest.TempPathFactory, model_folders: Callable[[str], Path]
) -> Callable[[str, str], Path]:
    """Maps names in `CASES` and `RECIPES` to a saved quantized pipeline. Read-only, please."""
    folders: dict[tuple[str, str], Path] = {}

    def folder(name: str, recipe: str) -> Path:
        if (name, recipe) not in folders:
            path = tmp_path_factory.mktemp(f"packed-{name}-{recipe}", numbered=False)
            pipe = DQPipeline.from_pretrained(model_folders(name), RECIPES[recipe])
            pipe.save_pretrained(path)
            folders[name, recipe] = path
        return folders[name, recipe]

    return folder
