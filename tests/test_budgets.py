"""`dq sensitivity`: table, picture, page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from dq.budgets.plots import layers
from dq.cli import app
from dq.errors import DQError
from dq.sensitivity.table import Table


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model_folders) -> tuple[Path, str]:
    """A folder that the command has written, and what it has said."""
    folder = tmp_path_factory.mktemp("sensitivity")
    arguments = [
        "sensitivity", str(model_folders("sd32")), "-o", str(folder / "out"), "--images", "4",
        "--steps", "2", "--calls", "1", "--bits", "1,4,6", "--check", "4", "--dtype", "float32",
        "--weights", "int2,int4,int8",
    ]  # fmt: skip
    environment = {"XDG_CACHE_HOME": str(folder / "cache")}
    result = CliRunner().invoke(app, arguments, env=environment, catch_exceptions=False)
    assert result.exit_code == 0
    return folder / "out", result.output


def test_it_says_which_layers_are_fragile_and_what_a_budget_buys(made) -> None:
    folder, said = made
    assert "conv_out" in said
    assert "4 bits" in said
    assert "1 bits" not in said  # no choice keeps that
    assert "int4 everywhere" in said
    assert "rank correlation" in said
    assert f"{folder}/report.html" in said
    fragile = [line for line in said.splitlines() if " quality " in line or " content " in line]
    assert len(fragile) == 20


def test_everything_is_written(made) -> None:
    folder, _ = made
    assert sorted(file.name for file in folder.iterdir()) == ["report.html", "sensitivity.json"]
    values = json.loads((folder / "sensitivity.json").read_text())
    assert [point["name"] for point in values["front"]] == ["4 bits", "6 bits"]
    assert len(values["random"]) == 4
    assert -1 <= values["additivity"] <= 1
    assert set(values["estimate"]) == {"w:int4", "a:int8"}
    table = Table.load(folder / "sensitivity.json")
    assert len(table.rows) > 40
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png") == 4  # weights, inputs, bits, front
    assert "http" not in page


def test_pictures_show_every_layer(made) -> None:
    table = Table.load(made[0] / "sensitivity.json")
    plot = layers(table, "weight", "int4")
    colours = {colour for _, colour in plot.getcolors(1 << 16) or ()}
    assert (42, 127, 98) in colours  # quality
    assert (208, 122, 45) in colours  # content
    assert isinstance(layers(table, "weight", "int3"), Image.Image)  # a format that nobody has


def test_a_table_that_is_none_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        DQError, match=r"sensitivity.json: no sensitivity table .*run dq sensitivity"
    ):
        Table.load(tmp_path / "sensitivity.json")


def test_an_output_that_exists_is_not_replaced(made) -> None:
    result = CliRunner().invoke(app, ["sensitivity", "emoji-unet", "-o", str(made[0])])
    assert isinstance(result.exception, DQError)
    assert "exists already" in str(result.exception)


@pytest.mark.slow
def test_accelerate_launch_finds_the_same(tmp_path: Path, model_folders) -> None:
    words = ["sensitivity", str(model_folders("sd32")), "--images", "4", "--steps", "2"]
    words += ["--calls", "2", "--bits", "4", "--dtype", "float32", "--share", "0.6"]
    start = [sys.executable, "-P", "-m"]
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m"]
    tables = []
    for name, before in (("one", []), ("two", launch)):
        cache = {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / f"cache-{name}")}
        command = [*start, *before, "dq", *words, "-o", str(tmp_path / name)]
        subprocess.run(command, check=True, env={**os.environ, **cache})
        tables.append(Table.load(tmp_path / name / "sensitivity.json"))
    assert tables[0] == tables[1]
