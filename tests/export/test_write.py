"""What is refused, what is written instead, and what is said about it."""

from collections.abc import Callable
from dataclasses import replace as replace_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dq.cli import app
from dq.errors import DQError
from dq.export import Exporter, check, export, exporters
from dq.nn import packed_layers
from dq.nn.packed import packed
from dq.nn.packed_layer import PackedLayer
from dq.nn.simulated import simulate
from dq.nn.swap import replace
from dq.pipelines.loading import load_denoiser
from dq.plan import LayerSpec
from dq.presets import weight_preset
from dq.spec import Granularity, TensorSpec
from dq.transform import Transform
from tests.export.cases import Case
from tests.test_cli import dq

Exported = Callable[..., Case]

QUERY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"  # has no bias


@pytest.mark.parametrize("to", exporters.names())
def test_every_target_says_what_it_is(to: str) -> None:
    exporter = exporters[to]
    assert isinstance(exporter, Exporter)
    assert exporter.help
    assert exporter.forms
    assert exporter.loads("UNet2DConditionModel")


def test_report_counts(exported: Exported) -> None:
    case = exported("bfl", "nvfp4-rtn")
    state = load_file(case.file)
    assert case.report.bytes_on_disk == case.file.stat().st_size
    assert {layer.name for layer in case.report.layers} == packed_layers(case.denoiser).keys()
    for layer in case.report.layers:
        leaves = ("weight", "weight_scale", "weight_scale_2", "input_scale")
        tensors = [state[f"{layer.name}.{x}"] for x in leaves if f"{layer.name}.{x}" in state]
        assert layer.bytes == sum(t.nbytes for t in tensors)
    forms = {layer.form: layer.reason for layer in case.report.layers}
    assert forms == {"nvfp4": "", "fp8": "", "bfloat16": "the layout has no convolutions"}
    lines = str(case.report).splitlines()
    assert lines[1].split() == ["layers", "weights", "bytes", "written", "as", "because"]
    assert lines[-2].endswith("bfloat16    the layout has no convolutions")


@pytest.mark.parametrize(
    ("to", "recipe", "words"),
    [
        ("bfl", "w8a8-dynamic", "the layout has no int8.*fp8, fp8-w8a16, nvfp4"),
        ("bfl", "mxfp4-rtn", None),  # the layers that blocks do not fit are fp8
        ("mx", "fp8", "the layout has no fp8.*mxfp4, mxfp6, mxfp8"),
        ("modelopt", "w8a8-dynamic", "none of .* packed layers fits"),
    ],
)
def test_if_nothing_fits_it_says_what_does(
    quantized: Callable, load: Callable, tmp_path: Path, to: str, recipe: str, words: str | None
) -> None:
    name, denoiser = load("sd32", recipe)
    output = tmp_path / "out"
    if words is None:
        report = export(denoiser, quantized("sd32", recipe), name, to, output)
        assert {layer.form for layer in report.layers} == {"fp8", "bfloat16"}
        return
    with pytest.raises(DQError, match=words):
        export(denoiser, quantized("sd32", recipe), name, to, output)
    assert not list(tmp_path.iterdir())


def test_float_checkpoints_are_refused(model_folders: Callable, tmp_path: Path) -> None:
    source = model_folders("sd32")
    name, denoiser = load_denoiser(str(source), None)
    with pytest.raises(DQError, match="not quantized by dq: run dq quantize"):
        export(denoiser, source, name, "bfl", tmp_path / "out")


def test_places_that_are_refused(quantized: Callable, tmp_path: Path) -> None:
    source = quantized("sd32", "fp8")
    with pytest.raises(DQError, match="exists already"):
        check(source, "bfl", tmp_path, overwrite=False)
    with pytest.raises(DQError, match="lies within"):
        check(source, "bfl", source / "export", overwrite=False)
    with pytest.raises(DQError, match=r"no model_index\.json"):
        check(source / "unet", "bfl", tmp_path / "out", overwrite=False)
    with pytest.raises(DQError, match=r"export target 'bfg'\. Did you mean 'bfl'"):
        check(source, "bfg", tmp_path / "out", overwrite=False)
    check(source, "bfl", tmp_path, overwrite=True)


def test_failure_leaves_nothing(load: Callable, quantized: Callable, tmp_path: Path) -> None:
    name, denoiser = load("sd32", "fp8")
    layer = packed_layers(denoiser)[QUERY]
    layer.bias = nn.Parameter(torch.zeros(layer.rows), requires_grad=False)
    with pytest.raises(DQError, match=f"{QUERY}.*bias.*folded"):
        export(denoiser, quantized("sd32", "fp8"), name, "bfl", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def changed(name: str, denoiser: nn.Module) -> PackedLayer:
    """Replaces a layer by one whose input is shifted and scaled first."""
    old = packed_layers(denoiser)[name]
    plain = nn.Linear(old.columns, old.rows, bias=False, dtype=torch.bfloat16)
    change = Transform(torch.randn(old.columns), torch.rand(old.columns) + 0.5)
    spec = LayerSpec(weight_preset("nvfp4"), transform=change.spec)
    made = packed(plain, spec)
    made.load_layer(simulate(plain, spec, transform=change))
    replace(denoiser, name, made)
    return made


def test_changed_inputs_are_undone(load: Callable, quantized: Callable, tmp_path: Path) -> None:
    name, denoiser = load("sd32", "nvfp4-rtn")
    layer = changed(QUERY, denoiser)
    report = export(denoiser, quantized("sd32", "nvfp4-rtn"), name, "bfl", tmp_path / "out")
    (mine,) = [x for x in report.layers if x.name == QUERY]
    assert mine.form == "bfloat16"
    assert mine.reason == "its input is changed first: shifted, scaled"
    state = load_file(tmp_path / "out" / name / "diffusion_pytorch_model.safetensors")
    assert torch.equal(state[f"{QUERY}.weight"], layer.plain()[0].bfloat16())
    # The shift has given it a bias, which the plain layer has not.
    assert layer.bias is not None
    assert f"{QUERY}.bias" not in state


STATIC = TensorSpec("int4", Granularity("tensor"), symmetric=False)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"input": replace_spec(STATIC, granularity=Granularity("group", 1))}, "a simulation only"),
        ({"input": replace_spec(STATIC, step_groups=(1.0, 9.0))}, "without step-groups"),
        ({"output_groups": (1.0, 9.0)}, "without ptqd"),
        ({"tabled": (1.0, 9.0)}, "kept, not cached"),
    ],
)
def test_what_needs_dq_to_be_the_same_model_is_refused(
    load: Callable, quantized: Callable, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    name, denoiser = load("sd32", "fp8")
    old = packed_layers(denoiser)[QUERY]
    plain = nn.Linear(old.columns, old.rows, bias=False, dtype=torch.bfloat16)
    replace(denoiser, QUERY, packed(plain, LayerSpec(weight_preset("int4"), **settings)))
    with pytest.raises(DQError, match=f"{QUERY}.*{words}"):
        export(denoiser, quantized("sd32", "fp8"), name, "bfl", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_command(quantized: Callable, tmp_path: Path) -> None:
    source, output = quantized("sd32", "nvfp4-rtn"), tmp_path / "out"
    done = dq("export", source, "--to", "modelopt", "-o", output)
    assert done.returncode == 0, done.stderr
    assert "written as" in done.stdout
    assert (output / "model_index.json").is_file()
    again = dq("export", source, "--to", "modelopt", "-o", output)
    assert again.returncode == 2
    assert "exists already" in again.stderr
    replaced = dq("export", source, "--to", "bfl", "-o", output, "--overwrite", "--json")
    assert replaced.returncode == 0, replaced.stderr
    assert '"to": "bfl"' in replaced.stdout


def test_command_names_every_target() -> None:
    (command,) = [c for c in app.registered_commands if c.callback.__name__ == "export"]
    words = command.callback.__annotations__["to"]
    assert all(name in str(words) for name in exporters.names())


def test_unknown_target_is_an_error(quantized: Callable, tmp_path: Path) -> None:
    done = dq("export", quantized("sd32", "fp8"), "--to", "onnx", "-o", tmp_path / "out")
    assert done.returncode == 2
    assert "unknown export target 'onnx'" in done.stderr
