"""Quantized and exported forms of the tiny pipelines, made once a session. Read-only, please."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dq import DQPipeline
from dq.export import export
from dq.pipelines.loading import load_denoiser
from tests.export.cases import Case


@pytest.fixture(scope="session")
def quantized(
    tmp_path_factory: pytest.TempPathFactory, model_folders: Callable[[str], Path]
) -> Callable[[str, str], Path]:
    """Maps a tiny model and a recipe to the folder of a quantized pipeline."""
    folders: dict[tuple[str, str], Path] = {}

    def folder(model: str, recipe: str) -> Path:
        if (model, recipe) not in folders:
            path = tmp_path_factory.mktemp(f"{model}-{recipe}", numbered=False)
            DQPipeline.from_pretrained(model_folders(model), recipe).save_pretrained(path)
            folders[model, recipe] = path
        return folders[model, recipe]

    return folder


@pytest.fixture(scope="session")
def load(quantized: Callable[[str, str], Path]) -> Callable[[str, str], tuple[str, Any]]:
    """Maps a tiny model and a recipe to name and new object of the packed denoiser, bfloat16."""
    return lambda model, recipe: load_denoiser(
        str(quantized(model, recipe)), None, dtype=torch.bfloat16
    )


@pytest.fixture(scope="session")
def exported(
    tmp_path_factory: pytest.TempPathFactory,
    quantized: Callable[[str, str], Path],
    load: Callable[[str, str], tuple[str, Any]],
) -> Callable[[str, str, str], Case]:
    """Maps a target, a recipe and a tiny model to what was exported."""
    cases: dict[tuple[str, str, str], Case] = {}

    def case(to: str, recipe: str, model: str = "sd32") -> Case:
        if (to, recipe, model) not in cases:
            folder = tmp_path_factory.mktemp("exported") / f"{model}-{recipe}-{to}"
            name, denoiser = load(model, recipe)
            report = export(denoiser, quantized(model, recipe), name, to, folder)
            cases[to, recipe, model] = Case(folder, name, denoiser, report)
        return cases[to, recipe, model]

    return case
