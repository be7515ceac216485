"""torchao's tensors, as diffusers loads them."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open

from dq.distance import relative_error
from dq.errors import DQError
from dq.export import check, exporters
from dq.nn import packed_layers, unpack_model
from tests.export.cases import Case, config
from tests.models import MODELS
from tests.packed import forward

pytest.importorskip("torchao")

Exported = Callable[..., Case]

RECIPES = {
    "fp8": {"Float8Tensor"},
    "fp8-w8a16": {"Float8Tensor"},
    "nvfp4-rtn": {"NVFP4Tensor", "Float8Tensor"},
    "nvfp4-a16-rtn": {"NVFP4Tensor", "Float8Tensor"},
    "mxfp4-rtn": {"MXTensor", "Float8Tensor"},
    "mxfp6": {"MXTensor", "Float8Tensor"},
    "mxfp8": {"MXTensor", "Float8Tensor"},
    "w8a8-dynamic": {"Int8Tensor"},
    "w4a8-dynamic": {"Int8Tensor"},
}


def loaded(case: Case) -> torch.nn.Module:
    kind = type(case.denoiser)
    return kind.from_pretrained(case.folder, subfolder=case.component, dtype=torch.bfloat16)


@pytest.mark.parametrize("recipe", RECIPES)
def test_diffusers_loads_the_same_weights(exported: Exported, recipe: str) -> None:
    case = exported("torchao", recipe)
    model, kinds = loaded(case), set()
    for name, layer in packed_layers(case.denoiser).items():
        weight, expected = model.get_submodule(name).weight, layer.float_weight()
        if type(weight.data) is torch.Tensor:
            assert torch.equal(weight, expected.bfloat16()), name
            continue
        kinds.add(type(weight.data).__name__)
        assert weight.dtype == torch.bfloat16
        found = weight.dequantize(torch.float32)
        if recipe.startswith("w4"):  # scale times multiplier first, or level times multiplier
            torch.testing.assert_close(found, expected, rtol=2e-7, atol=0)
        else:
            assert torch.equal(found, expected), name
    assert kinds == RECIPES[recipe]


@pytest.mark.parametrize("recipe", ["nvfp4-a16-rtn", "fp8-w8a16", "w8a16"])
def test_float_inputs_run_anywhere(exported: Exported, load: Callable, recipe: str) -> None:
    case = exported("torchao", recipe)
    _, plain = load("sd32", recipe)
    assert relative_error(forward(loaded(case)), forward(plain.dequantize())) <= 0.02


@pytest.mark.parametrize("recipe", ["w8a8-dynamic", "w4a8-dynamic", "fp8", "mxfp6"])
def test_quantized_inputs_run_on_a_cpu(exported: Exported, load: Callable, recipe: str) -> None:
    """As those of dq, in a transformer without convolutions: both quantize the same layers."""
    case = exported("torchao", recipe, "flux")
    _, packed = load("flux", recipe)
    _, plain = load("flux", recipe)
    unpack_model(plain)
    expected, error = forward(packed), relative_error(forward(plain), forward(packed))
    assert relative_error(forward(loaded(case)), expected) <= max(error, 0.02)


def test_inputs_keep_their_format(exported: Exported) -> None:
    kinds = {}
    for recipe in RECIPES:
        model = loaded(exported("torchao", recipe))
        weights = [m.weight.data for m in model.modules() if isinstance(m, torch.nn.Linear)]
        tensors = [w for w in weights if hasattr(w, "act_quant_kwargs")]
        kinds[recipe] = {type(w.act_quant_kwargs).__name__ for w in tensors if w.shape[0] % 16 == 0}
    assert kinds["fp8"] == {"QuantizeTensorToFloat8Kwargs"}
    assert kinds["nvfp4-rtn"] == {"QuantizeTensorToNVFP4Kwargs", "QuantizeTensorToFloat8Kwargs"}
    assert kinds["mxfp4-rtn"] == {"QuantizeTensorToMXKwargs", "QuantizeTensorToFloat8Kwargs"}
    assert kinds["w8a8-dynamic"] == {"QuantizeTensorToInt8Kwargs"}
    assert kinds["fp8-w8a16"] == kinds["nvfp4-a16-rtn"] == {"NoneType"}


def test_pipeline_draws(exported: Exported) -> None:
    case = exported("torchao", "w8a8-dynamic")
    pipe = DiffusionPipeline.from_pretrained(case.folder, torch_dtype=torch.bfloat16)
    assert MODELS["sd32"].call(pipe).shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("nvfp4-a16-rtn", "NVFP4WeightOnlyConfig"),
        ("fp8", "Float8DynamicActivationFloat8WeightConfig"),
        ("w8a8-dynamic", "Int8DynamicActivationInt8WeightConfig"),
        ("mxfp6", "MXDynamicActivationMXWeightConfig"),
    ],
)
def test_config_names_what_most_layers_have(exported: Exported, recipe: str, expected: str) -> None:
    values = config(exported("torchao", recipe))
    assert values["quant_method"] == "torchao"
    assert values["quant_type"]["default"]["_type"] == expected


def test_file_says_what_torchao_looks_for(exported: Exported) -> None:
    from torchao.prototype.safetensors.safetensors_utils import is_metadata_torchao

    with safe_open(exported("torchao", "nvfp4-rtn").file, "pt") as file:
        assert is_metadata_torchao(file.metadata())


def test_mx_weights_need_mx_inputs(load: Callable) -> None:
    _, denoiser = load("sd32", "mxfp4-a16-rtn")
    refusals = {exporters["torchao"].refuses(x) for x in packed_layers(denoiser).values()}
    assert any("not by float inputs" in str(words) for words in refusals)


def test_missing_torchao_is_said_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, quantized: Callable, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(DQError, match="pip install 'torchao>="):
        check(quantized("sd32", "fp8"), "torchao", tmp_path / "out", overwrite=False)
