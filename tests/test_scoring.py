"""`dq eval`, as a user types it, on the checkpoint inside the package and on a tiny pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from dq.eval.grid import grid
from tests.test_cli import Done, dq

FAST = ("-n", "4", "--steps", "2", "--batch", "2", "--guidance", "1")


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    folder = tmp_path_factory.mktemp("eval") / "out"
    words = ("eval", "w8a8", "w3a8", "--against", "emoji-unet", *FAST, "-o", folder, "--json")
    done = dq(*words, "--max", "fid=1e9", "--min", "psnr=5", "--max-drop", "clip=100")
    assert done.returncode == 0, done.stderr
    return folder, done


def test_json_has_metrics_by_name(scored: tuple[Path, Done]) -> None:
    folder, done = scored
    values = json.loads(done.stdout)
    assert set(values["metrics"]) == {"psnr", "ssim", "cosine", "clip", "fid", "kid"}
    assert set(values["baseline"]) == {"clip"}
    assert values["failures"] == []
    assert values["facts"]["images"] == 4
    assert values["facts"]["seeds"] == "0 to 3"
    assert "biased" in values["facts"]["warning"]
    w8, w3 = values["candidates"]
    assert (w8["name"], w3["name"]) == ("w8a8", "w3a8")
    assert w8["scores"]["metrics"]["psnr"] > w3["scores"]["metrics"]["psnr"]
    assert w8["average_weight_bits"] > w3["average_weight_bits"]
    assert w8["seconds_per_step"] == pytest.approx(w8["seconds_per_image"] / 2)
    assert sum(w8["compute_paths"].values()) > 100
    assert json.loads((folder / "scores.json").read_text())["metrics"] == values["metrics"]


def test_the_page_holds_everything(scored: tuple[Path, Done]) -> None:
    folder, _ = scored
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 2
    for words in ("full precision", "w8a8", "w3a8", "that differ most", "psnr", "int8 conv"):
        assert words in page
    assert "http://" not in page
    assert "https://" not in page


def test_a_second_run_draws_nothing(
    scored: tuple[Path, Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, before = scored
    monkeypatch.setattr("dq.pipelines.gallery.draw", None)
    words = ("eval", "w8a8", "w3a8", "--against", "emoji-unet", *FAST, "-o", folder, "--json")
    again = dq(*words)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["metrics"] == json.loads(before.stdout)["metrics"]


def test_thresholds_give_exit_code_1(scored: tuple[Path, Done]) -> None:
    folder, _ = scored
    words = ("eval", "w8a8", "--against", "emoji-unet", *FAST, "-o", folder)
    done = dq(*words, "--min", "psnr=99", "--max", "fid=1e9")
    assert done.returncode == 1
    assert "failed: w8a8: psnr: " in done.stderr
    assert "is not at least 99" in done.stderr
    assert "fid" not in done.stderr
    assert "± " in done.stdout


def test_a_checkpoint_and_a_reference(scored: tuple[Path, Done], tmp_path: Path) -> None:
    folder, _ = scored
    assert (
        dq("quantize", "emoji-unet", "-r", "w4a8-dynamic", "-o", tmp_path / "packed").returncode
        == 0
    )
    reference = folder / "full"
    words = ("--metrics", "fid,kid,sqnr", "--reference", reference, "--json", "-o", folder)
    done = dq("eval", tmp_path / "packed", "--against", "emoji-unet", *FAST, *words)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert set(values["metrics"]) == {"fid", "kid", "fid-reference", "kid-reference", "sqnr"}
    assert 10 < values["metrics"]["sqnr"] < 30
    assert values["baseline"]["fid-reference"] == pytest.approx(0, abs=1e-2)
    (candidate,) = values["candidates"]
    files = list((tmp_path / "packed" / "unet").glob("*.safetensors"))
    assert candidate["name"] == "packed"
    assert candidate["bytes_on_disk"] == sum(f.stat().st_size for f in files)
    assert candidate["bytes_on_disk"] == pytest.approx(candidate["stored_bytes"], rel=0.03)


def test_another_pipeline_is_a_reference(scored: tuple[Path, Done]) -> None:
    folder, _ = scored
    words = ("--metrics", "fid", "--reference", "emoji-dit", "-o", folder)
    done = dq("eval", "w8a8", "--against", "emoji-unet", *FAST, *words)
    assert done.returncode == 0, done.stderr
    assert "reference emoji-dit (4)" in done.stdout
    assert "fid-reference" in done.stdout
    assert (folder / "reference" / "00003.png").is_file()
    assert "Distances to the reference set" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("-n", "1"), "at least 2 images"),
        (("--metrics", "fdi"), "Did you mean 'fid'"),
        (("--features", "incepton"), "Did you mean 'inception'"),
        (("--max", "fid"), "expected a metric and a number"),
        (("--steps", "3"), "they differ in steps"),
        (("--resize", "cleen"), "clean"),
    ],
)
def test_mistakes_are_one_line(
    scored: tuple[Path, Done], words: tuple[str, ...], text: str
) -> None:
    folder, _ = scored
    done = dq("eval", "w8a8", "--against", "emoji-unet", *FAST, "-o", folder, *words)
    assert done.returncode == 2
    assert text in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_name_that_means_nothing_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    done = dq("eval", "w8a8", "paro-5o", "--against", "emoji-unet", *FAST, "-o", tmp_path / "out")
    assert done.returncode == 2
    assert "unknown recipe 'paro-5o'. Did you mean 'paro-50'" in done.stderr
    assert not (tmp_path / "out").exists()


def test_grids_take_a_difference_row() -> None:
    image = Image.new("RGB", (8, 8))
    assert grid({"a": [image], "b": [image], "c": [image]}, ["x"]).height > 3 * 128
