"""The benchmark runs every form of a model, says what ran, and leaves no setting behind."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dq.bench import RandomModel, Report, run
from dq.bench.attention import run as sparse_attention
from dq.bench.models import RANDOM_MODELS, Checkpoint, subject
from dq.bench.peers import PEERS, peers
from dq.bench.plot import plot
from dq.bench.profile import operators, products
from dq.bench.timing import Times, interleave, threads_set
from dq.calibrate import CalibrationSpec
from dq.distance import relative_error
from dq.errors import DQError
from dq.family import family_of
from dq.kernels.native import library
from dq.memory import peak_growth
from dq.pipelines.noise import NoiseSource

TINY = RandomModel(
    "dit",
    "DiTTransformer2DModel",
    {**RANDOM_MODELS["dit"].config, "sample_size": 8, "num_layers": 1, "num_attention_heads": 1},
)
RECIPES = ("w8a8", "w8a8-dynamic", "w8a8-static", "w4a16")


def settings() -> tuple[object, ...]:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    precision = torch.get_float32_matmul_precision()
    return torch.get_num_threads(), matmul.fp32_precision, precision, torch.is_grad_enabled()


@pytest.fixture(scope="module")
def report(model_folders: Callable[[str], Path]) -> Report:
    before, state = settings(), torch.get_rng_state()
    found = run((str(model_folders("sd32")), TINY), RECIPES, threads=1, repeats=2)
    assert settings() == before
    assert torch.equal(torch.get_rng_state(), state)
    return found


def test_report_is_json(report: Report, tmp_path: Path) -> None:
    report.save(tmp_path / "bench.json")
    values = json.loads((tmp_path / "bench.json").read_text())
    assert values["machine"]["threads"] == 1
    assert values["settings"] == {"batch": 2, "repeats": 2, "seed": 0, "device": "cpu"}
    assert len(values["models"]) == 2
    for measured in values["models"].values():
        assert list(measured) == ["fp32", "fp32-onednn", "bf16", "bf16+attention", *RECIPES]
        for entry in measured.values():
            assert entry["milliseconds"] > 0
            assert entry["spread"] >= 0
            assert entry["note"]


def test_ratios(report: Report) -> None:
    for measured in report.models.values():
        baseline = measured["bf16"]
        assert baseline.ratio_to_bf16 == 1
        for entry in measured.values():
            ratio = entry.milliseconds / baseline.milliseconds
            assert entry.ratio_to_bf16 == pytest.approx(ratio)


def test_errors_and_bytes(report: Report) -> None:
    for measured in report.models.values():
        assert measured["fp32"].relative_error == 0
        assert measured["fp32-onednn"].relative_error < 1e-5
        assert 0 < measured["bf16"].relative_error < measured["w4a16"].relative_error < 0.5
        sizes = [measured[n].stored_megabytes or 0 for n in ("fp32", "bf16", "w8a8", "w4a16")]
        assert sizes == sorted(sizes, reverse=True)
        assert measured["w8a8"].resident_megabytes > measured["w8a8"].stored_megabytes


def test_says_what_ran(report: Report) -> None:
    measured = report.models["dit"]
    assert measured["bf16"].compute_paths == {"bfloat16, stock kernel": 12}
    assert set(measured["w8a8"].compute_paths) >= {"int8 gemm (oneDNN)"}
    product = "qlinear_pointwise" if library() is None else "linear_rows"  # it has few rows
    assert product in measured["w8a8"].note
    assert "dq::" not in measured["w8a8"].note
    assert "onednn_linear" not in measured["w8a8"].note
    assert product not in measured["w4a16"].note
    # DiT's own choice is dynamic; what is equal is measured once and says so.
    assert measured["w8a8-dynamic"].note == "the same as w8a8"
    assert measured["w8a8-dynamic"].milliseconds == measured["w8a8"].milliseconds
    assert measured["w8a8-static"].milliseconds != measured["w8a8"].milliseconds


def test_memory_is_what_is_stored_kept_and_taken_for_a_while(report: Report) -> None:
    for measured in report.models.values():
        for entry in measured.values():
            assert entry.peak_megabytes is None or entry.peak_megabytes >= entry.resident_megabytes


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not tell")
def test_peak_growth_sees_what_is_freed_again() -> None:
    def run() -> None:
        torch.ones(10_000_000)

    growth = peak_growth(run)
    assert growth is not None
    assert 39e6 < growth < 60e6
    assert (peak_growth(lambda: None) or 0) < 2e6


def test_profile_puts_operators_side_by_side(report: Report) -> None:
    text = report.profile()
    assert ("onednn::qlinear_pointwise" if library() is None else "native::linear_rows") in text
    assert "aten::addmm" in text


def test_plot(report: Report, tmp_path: Path) -> None:
    plot(report, tmp_path / "bench.png")
    picture = np.asarray(Image.open(tmp_path / "bench.png"))
    bars = sum(len(measured) for measured in report.models.values())
    assert picture.shape[0] > 20 * bars
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 4  # bars of three colours, and text


def test_unknown_and_missing_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DQError, match="torchao-int8-dynamic"):
        peers(("torchao-int8-dynamc",))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert peers(("all",)) == {}
    with pytest.raises(DQError, match=r"needs openvino, nncf: pip install"):
        peers(("openvino-int8",))


@pytest.mark.parametrize("name", PEERS)
def test_peers_that_are_installed_run(name: str) -> None:
    if name not in peers(("all",)):
        pytest.skip("not installed")
    model = TINY.plain(torch.bfloat16, seed=0)
    inputs = family_of(model).sample_inputs(model, 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(**inputs, return_dict=False)[0].float()
        made = PEERS[name].build(model, inputs, 1)
        found = made(**inputs, return_dict=False)[0].float()
    assert relative_error(found, expected) < 0.5


def test_compiled_forms_are_compared_with_compiled_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    found = run((TINY,), ("w8a8",), repeats=1, compiled=True).models["dit"]
    assert list(found)[-2:] == ["bf16, compiled", "w8a8, compiled"]
    assert found["bf16, compiled"].ratio_to_bf16 == 1
    ratio = found["w8a8, compiled"].milliseconds / found["bf16, compiled"].milliseconds
    assert found["w8a8, compiled"].ratio_to_bf16 == pytest.approx(ratio)


def test_whole_pipelines(model_folders: Callable[[str], Path]) -> None:
    folder = str(model_folders("sd32"))
    report = run((folder,), ("w8a8-dynamic",), repeats=1, batch=2, steps=2)
    assert report.settings["steps"] == 2
    (found,) = report.models.values()
    assert list(found) == ["fp32", "bf16", "bf16+attention", "w8a8-dynamic"]
    assert 0 < found["w8a8-dynamic"].relative_error < 1
    with pytest.raises(DQError, match="without a pipeline"):
        run((TINY,), (), repeats=1, steps=2)
    with pytest.raises(DQError, match="without compiled forms"):
        run((folder,), (), repeats=1, steps=2, compiled=True)


def test_table(report: Report) -> None:
    text = str(report)
    assert "x bf16" in text
    assert "the same as w8a8" in text
    for measured in report.models.values():
        slower = [name for name, entry in measured.items() if entry.is_slower()]
        assert "bf16" not in slower
        assert f"by either clock: {', '.join(slower) or 'none'}" in text


def test_threads_are_restored() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads_set(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_rounds_are_interleaved() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    times = interleave(runs, 3, "testing")
    assert "".join(order[-6:]) == "ababab"
    assert len(times["a"].wall) == len(times["b"].cpu) == 3


def test_median_and_quartiles() -> None:
    times = Times(wall=(0.001, 0.002, 0.003, 0.004, 0.1), cpu=(0.5, 0.1, 0.2, 0.3, 0.4))
    assert times.milliseconds == pytest.approx(3)
    assert times.spread == pytest.approx(2)
    assert times.cpu_milliseconds == pytest.approx(300)
    assert Times((1.0,), (1.0,)).spread == 0


def test_operators_are_counted() -> None:
    layer, x = nn.Linear(256, 256), torch.ones(256, 256)
    with torch.no_grad():
        found = operators(lambda: layer(layer(x)))
    assert {o.name: o.calls for o in found}["aten::addmm"] == 2
    assert products(found) == "2 addmm"


def test_random_models_repeat() -> None:
    one, two = (TINY.plain(torch.float32, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert subject("unet") is RANDOM_MODELS["unet"]
    assert subject("emoji-unet") == Checkpoint("emoji-unet")


@pytest.mark.parametrize(("name", "millions"), [("unet", 51.5), ("dit", 85.1)])
def test_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = RANDOM_MODELS[name].plain(torch.float32, seed=0)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


def test_noise_covers_the_schedule() -> None:
    model = TINY.plain(torch.float32, seed=0)
    source, spec = NoiseSource(model), CalibrationSpec(n=3, steps=2, batch=2)
    seen = []
    hook = model.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(inputs["timestep"].tolist()), with_kwargs=True
    )
    for batch in range(source.batches(spec)):
        source.run(spec, batch)
    hook.remove()
    assert seen == [[250, 250], [750, 750], [250], [750]]


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"threads": 0}, {"recipes": ("w9a9",)}])
def test_wrong_arguments(wrong: dict[str, object]) -> None:
    with pytest.raises(DQError):
        run((TINY,), **wrong)  # type: ignore[arg-type]


def test_ways_that_cannot_compute_are_named() -> None:
    with pytest.raises(DQError, match="triton cannot compute this on cpu"):
        sparse_attention(128, 2, 16, densities=(0.5,), repeats=2, asked=("triton",))
    with pytest.raises(DQError, match=r"unknown way of block-sparse attention"):
        sparse_attention(128, 2, 16, asked=("tritn",))


def test_block_sparse_attention_is_timed_beside_dense() -> None:
    report = sparse_attention(128, 2, 16, densities=(0.5,), repeats=2)
    names = set(report.times)
    assert {"bfloat16 sdpa", "float32 sdpa", "float32 gathered @ 0.5"} <= names
    assert not any("by-block" in name for name in names)
    assert json.loads(json.dumps(report.to_dict()))["shape"] == [1, 2, 128, 16]
    lines = str(report).splitlines()
    dense = next(line for line in lines if line.startswith("float32 sdpa"))
    assert dense.split()[3] == "1.00"
