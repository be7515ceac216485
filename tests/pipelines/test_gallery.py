"""Galleries continue where they stopped, and are the same whoever draws them."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dq.errors import DQError
from dq.pipelines import gallery as module
from dq.pipelines.gallery import Gallery, Settings, read_gallery
from tests.models import MODELS

SETTINGS = Settings(("a fox", "a hen", "a cat", "a dog", "a cow"), seed=3, steps=1, batch=2)


def pixels(gallery: Gallery) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)) for file in gallery.files])


@pytest.fixture(scope="module")
def pipe():
    return MODELS["sd32"].build()


def drawn(folder: Path, pipe, **changes) -> Gallery:
    made = Gallery(folder, "sd32", dataclasses.replace(SETTINGS, **changes))
    made.draw(pipe)
    return made


def test_it_holds_images_latents_and_times(tmp_path: Path, pipe) -> None:
    made = drawn(tmp_path / "g", pipe)
    assert pixels(made).shape == (5, 32, 32, 3)
    assert made.latents().shape == (5, 4, 16, 16)
    assert len(made.seconds()) == 3
    assert all(t > 0 for t in made.seconds())
    assert made.missing() == []
    assert read_gallery(tmp_path / "g") == made
    assert "decode" not in vars(pipe.vae)  # what watched the decoder is gone


def test_image_i_has_seed_and_prompt_i(tmp_path: Path, pipe) -> None:
    made = drawn(tmp_path / "g", pipe)
    later = drawn(tmp_path / "h", pipe, prompts=SETTINGS.prompts[2:], seed=SETTINGS.seed + 2)
    assert np.array_equal(pixels(made)[2:], pixels(later))


def test_a_killed_run_continues_and_draws_the_same(
    tmp_path: Path, pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pixels(drawn(tmp_path / "whole", pipe))
    original, drawings = module.draw, []

    def killed(pipe, prompts, *rest, **options):
        if len(drawings) == 2:
            raise KeyboardInterrupt
        drawings.append(prompts)
        return original(pipe, prompts, *rest, **options)

    monkeypatch.setattr(module, "draw", killed)
    with pytest.raises(KeyboardInterrupt):
        drawn(tmp_path / "g", pipe)
    monkeypatch.setattr(module, "draw", original)
    stopped = read_gallery(tmp_path / "g")
    assert [list(batch) for batch in stopped.missing()] == [[4]]
    assert np.array_equal(pixels(drawn(tmp_path / "g", pipe)), whole)


def test_processes_share_the_batches(tmp_path: Path, pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pixels(drawn(tmp_path / "whole", pipe))

    class Rank:
        num_processes = 2

        def __init__(self, index: int) -> None:
            self.process_index, self.is_main_process = index, index == 0

        def wait_for_everyone(self) -> None:
            pass

    for rank, left in ((0, [[2, 3]]), (1, [])):
        monkeypatch.setattr(module, "PartialState", lambda rank=rank: Rank(rank))
        made = drawn(tmp_path / "g", pipe)
        assert [list(batch) for batch in made.missing()] == left
    assert np.array_equal(pixels(made), whole)


@pytest.mark.slow
def test_accelerate_launch_draws_the_same(tmp_path: Path) -> None:
    words = ["eval", "w8a8", "--against", "emoji-unet", "-n", "4", "--batch", "2", "--steps", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-P", "-m"]
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m"]
    for name, before in (("one", []), ("two", launch)):
        command = [*start, *before, "dq", *words, "-o", str(tmp_path / name)]
        subprocess.run(command, check=True, env=environment)
    for side in ("full", "w8a8"):
        one, two = (read_gallery(tmp_path / name / side) for name in ("one", "two"))
        assert np.array_equal(pixels(one), pixels(two))
        assert torch.equal(one.latents(), two.latents())
    texts = [(tmp_path / name / "scores.json").read_text() for name in ("one", "two")]
    measured = ("seconds", "peak", "folder")  # of a run, not of images
    keep = [[x for x in t.splitlines() if not any(m in x for m in measured)] for t in texts]
    assert keep[0] == keep[1]


@pytest.mark.parametrize(
    ("change", "word"),
    [({"seed": 4}, "seed"), ({"steps": 2}, "steps"), ({"prompts": ("a",)}, "prompts")],
)
def test_other_settings_need_another_folder(tmp_path: Path, pipe, change: dict, word: str) -> None:
    Gallery(tmp_path / "g", "sd32", SETTINGS).open()
    (tmp_path / "g" / "00000.png").write_bytes(b"of a run that was killed")
    Gallery(tmp_path / "g", "sd32", SETTINGS).open()
    with pytest.raises(DQError, match=rf"they differ in {word}; choose another folder"):
        drawn(tmp_path / "g", pipe, **change)


def test_a_run_that_drew_nothing_is_in_nobodys_way(tmp_path: Path, pipe) -> None:
    Gallery(tmp_path / "g", "sd32", dataclasses.replace(SETTINGS, prompts=("a typo",))).open()
    assert drawn(tmp_path / "g", pipe).files[0].is_file()


def test_other_models_and_other_files_too(tmp_path: Path) -> None:
    Gallery(tmp_path / "g", "sd32", SETTINGS).open()
    (tmp_path / "g" / "00000.png").write_bytes(b"")
    with pytest.raises(DQError, match="they differ in model"):
        Gallery(tmp_path / "g", "sdxl", SETTINGS).open()
    (tmp_path / "h").mkdir()
    (tmp_path / "h" / "precious.txt").write_text("mine")
    with pytest.raises(DQError, match="holds other files"):
        Gallery(tmp_path / "h", "sd32", SETTINGS).open()


def test_damaged_records_are_named(tmp_path: Path) -> None:
    with pytest.raises(DQError, match="no gallery"):
        read_gallery(tmp_path)
    (tmp_path / "gallery.json").write_text("{")
    with pytest.raises(DQError, match=r"gallery\.json is damaged"):
        read_gallery(tmp_path)
