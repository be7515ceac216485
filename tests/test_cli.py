"""The command line, as a user types it, on a tiny pipeline."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from dq.bench.machine import measure
from dq.cli import main
from dq.kernels.measured import Table
from dq.recipe import templates

SHORT = ("--images", "2", "--steps", "1")


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def dq(*words: object) -> Done:
    """Run the command line in this process: importing the libraries anew takes seconds."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    before, sys.argv = sys.argv, ["dq", *map(str, words)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        sys.argv = before
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def folder(model_folders: Callable[[str], Path]) -> Path:
    return model_folders("sd32")


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("cli") / "out"
    done = dq("quantize", folder, "-r", "w4a8", "-o", output, *SHORT)
    assert done.returncode == 0, done.stderr
    assert "bits     4." in done.stdout
    if sys.platform == "linux":
        assert re.search(r" in \d+ s, \d+\.\d GB of memory at the peak\n$", done.stdout)
    return output


def test_quantize_writes_a_pipeline_with_its_recipe(packed: Path) -> None:
    assert (packed / "model_index.json").is_file()
    assert json.loads((packed / "dq_recipe.json").read_text())["name"] == "w4a8"
    assert [p.name for p in packed.parent.iterdir()] == ["out"]  # no work folder stays


def test_quantize_refuses_an_existing_output(packed: Path, folder: Path) -> None:
    before = sorted(p.stat().st_mtime_ns for p in packed.rglob("*"))
    done = dq("quantize", folder, "-r", "w8a8", "-o", packed, *SHORT)
    assert done.returncode == 2
    assert "exists already" in done.stderr
    assert sorted(p.stat().st_mtime_ns for p in packed.rglob("*")) == before


def test_killed_quantize_leaves_the_old_output_and_resumes(
    packed: Path, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    command = ("quantize", folder, "-r", "w8a8", "-o", output, "--steps", "1")
    output.mkdir()
    (output / "old").write_text("old")
    (output / "model_index.json").write_text("{}")  # else it would not be overwritten
    many = [sys.executable, "-P", "-m", "dq", *map(str, command), "--images", "160", "--overwrite"]
    running = subprocess.Popen(many, stderr=subprocess.DEVNULL)
    work = tmp_path / ".out.work"
    deadline = time.monotonic() + 120
    while not list(work.glob("*/calls-0002.safetensors")) and time.monotonic() < deadline:
        assert running.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert (output / "old").read_text() == "old"
    first = min(work.glob("*/calls-0000.safetensors"))
    written = first.stat().st_mtime_ns
    again = subprocess.Popen(many, stderr=subprocess.DEVNULL)
    while not list(work.glob("*/calls-0004.safetensors")) and again.poll() is None:
        assert first.stat().st_mtime_ns == written, "a finished batch was drawn again"
        time.sleep(0.02)
    assert again.wait() == 0
    assert not (output / "old").exists()
    assert not work.exists()


def test_inspect_counts_what_is_there(packed: Path) -> None:
    report = json.loads(dq("inspect", packed, "--json").stdout)
    (file,) = (packed / "unet").glob("*.safetensors")
    assert report["bytes_on_disk"] == file.stat().st_size
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    assert report["bytes_planned"] == file.stat().st_size - header
    weights = sum(layer["weights"] for layer in report["layers"])
    stored = sum(layer["bytes"] for layer in report["layers"])
    assert report["average_weight_bits"] == pytest.approx(8 * stored / weights)
    assert {layer["compute_path"].split(" (")[0] for layer in report["layers"]} <= {
        "int8 gemm",
        "int8 conv",
        "simulated",
    }
    text = dq("inspect", packed).stdout
    assert f"bits     {report['average_weight_bits']:.2f} a weight" in text


def test_inspect_says_where_int8_loses(packed: Path) -> None:
    text = dq("inspect", packed).stdout
    assert "int8 loses to bf16 at K = N of, by rows of the input: " in text
    assert "(measured on " in text


def test_measure_keeps_what_it_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    small = measure(repeats=1, attention=[(16, 16, 16)], linear=[(4, 1024)])
    monkeypatch.setattr("dq.bench.machine.measure", lambda threads, repeats: small)
    done = dq("measure", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == small.to_dict()
    assert Table.read(tmp_path / "dq" / "measured.json") == small
    assert "int8 loses" in dq("measure").stdout


def test_bench_draws_a_plot_and_prints_a_profile(folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / "bench.png"
    words = ("-m", folder, "-r", "w8a8-dynamic", "--repeats", "1", "--profile", "--plot", picture)
    done = dq("bench", *words)
    assert done.returncode == 0, done.stderr
    assert "bf16+attention" in done.stdout
    assert "aten::addmm" in done.stdout
    assert Image.open(picture).width > 400


def test_inspect_accounts_for_every_byte_of_the_file(packed: Path) -> None:
    report = json.loads(dq("inspect", packed, "--json").stdout)
    counted = report["bytes_planned"] + report["bytes_of_headers"]
    assert abs(report["bytes_on_disk"] - counted) < 64  # safetensors aligns its header
    assert 0 < report["bytes_of_headers"] < 0.2 * report["bytes_on_disk"]


def test_inspect_of_a_float_model(folder: Path) -> None:
    text = dq("inspect", folder, "--theoretical").stdout
    assert "not quantized" in text
    assert "theoretical" in text


def test_inspect_counts_operations_if_asked(packed: Path) -> None:
    found = json.loads(dq("inspect", packed, "--theoretical", "--json").stdout)["theoretical"]
    assert 0 < found["bit_operations"] < 64 * found["macs"]
    assert json.loads(dq("inspect", packed, "--json").stdout)["theoretical"] is None


def test_generate_one_and_several(packed: Path, tmp_path: Path) -> None:
    image = tmp_path / "one.png"
    words = ("generate", packed, "--steps", 2, "--dtype", "float32")
    done = dq(*words, "--prompt", "a fox", "-o", image, "--seed", 5)
    assert done.returncode == 0, done.stderr
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\na fox\n")
    listed = json.loads(
        dq(*words, "--prompts", file, "-o", tmp_path / "many", "--seed", 4, "--json").stdout
    )
    assert [Path(f).name for f in listed["files"]] == ["00000.png", "00001.png"]
    # The second prompt has seed 4 + 1: the same image, whatever else is in its batch.
    a, b = Image.open(image), Image.open(listed["files"][1])
    assert max(high for _, high in Image.blend(a, b, 0).getextrema()) > 0
    differences = [abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True)]
    assert max(differences) <= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("quantize", "{model}", "-r", "w4a9", "-o", "{out}"), "Did you mean 'w4a8'"),
        (("quantize", "{model}", "-r", "w4a8-g37", "-o", "{out}"), "fits no layer"),
        (("quantize", "{model}", "-r", "w4a8", "-o", "{out}", "--component", "une"), "'unet'"),
        (
            ("quantize", "{model}", "-r", "w4a8", "-o", "{out}", "--dtype", "float8"),
            "unknown dtype",
        ),
        (("quantize", "{model}", "-r", "missing.yaml", "-o", "{out}"), "does not exist"),
        (("quantize", "{packed}", "-r", "w4a8", "-o", "{out}"), "quantized already"),
        (("generate", "{model}", "-o", "{out}"), "nothing to draw"),
        (("generate", "{model}", "--prompts", "missing.txt", "-o", "{out}"), "does not exist"),
        (("inspect", "{out}"), "no model_index.json"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    words: tuple[str, ...], message: str, packed: Path, folder: Path, tmp_path: Path
) -> None:
    places = {"model": folder, "packed": packed, "out": tmp_path / "out"}
    done = dq(*(word.format(**places) for word in words))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_recipes_lists_every_template() -> None:
    assert json.loads(dq("recipes", "--json").stdout).keys() == set(templates.names())
    assert all(name in dq("recipes").stdout for name in templates.names())


def test_attention_maps_are_a_page(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "maps.html"
    recipe = tmp_path / "paro.yaml"
    recipe.write_text(
        "steps: [{method: paro, density: 0.5, block: [8]}]\ncalibration: {n: 1, steps: 2, batch: 1}"
    )
    done = dq("attention", folder, "-r", recipe, "-o", page, "--steps", 2, "--heads", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"page: {page}\n")
    assert page.read_text().startswith("<!doctype html>")
    again = dq("attention", folder, "-r", recipe, "-o", page)
    assert again.returncode == 2
    assert "exists" in again.stderr


def test_images_have_the_size_that_was_asked_for(folder: Path, tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    done = dq("generate", folder, "--prompt", "a", "--steps", 1, "--size", "64x32", "-o", image)
    assert done.returncode == 0, done.stderr
    assert Image.open(image).size == (32, 64)
    wrong = dq("generate", folder, "--prompt", "a", "--size", "64", "-o", tmp_path / "b.png")
    assert wrong.returncode == 2
    assert "a size is HEIGHTxWIDTH or FRAMESxHEIGHTxWIDTH, not '64'" in wrong.stderr
