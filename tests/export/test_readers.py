"""Through the files and back: readers that know nothing of dq find the very same model."""

from collections.abc import Callable

import pytest
import torch
from diffusers import BFLQuantizationConfig, DiffusionPipeline
from diffusers.quantizers.bfl import utils as bfl

from dq.nn import packed_layers
from tests.export.cases import Case, config, decoded, stored
from tests.packed import forward, same_state

Exported = Callable[..., Case]

BFL = ("fp8", "fp8-w8a16", "nvfp4-rtn", "nvfp4-a16-rtn")
PLAIN = (
    *(("bfl", recipe, "sd32") for recipe in BFL),
    *(("modelopt", recipe, "sd32") for recipe in (*BFL, "mxfp8")),
    *(("mx", recipe, "sd32") for recipe in ("mxfp4-rtn", "mxfp6", "mxfp8")),
    ("bfl", "nvfp4-rtn", "sd3"),
    ("modelopt", "fp8", "dit64"),
    ("mx", "mxfp4-rtn", "dit64"),
)


@pytest.mark.parametrize(("to", "recipe", "model"), PLAIN)
def test_file_stands_for_the_same_model(
    exported: Exported, to: str, recipe: str, model: str, load: Callable
) -> None:
    case = exported(to, recipe, model)
    found, packed = decoded(case), packed_layers(case.denoiser)
    written = {layer.name for layer in case.report.layers if not layer.reason}
    assert written
    for name in written:
        assert torch.equal(found[f"{name}.weight"], packed[name].float_weight()), name
    _, plain = load(model, recipe)
    expected = plain.dequantize().state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].to(tensor.dtype), tensor), name


@pytest.mark.parametrize("recipe", BFL)
def test_bfl_layout(exported: Exported, recipe: str) -> None:
    case = exported("bfl", recipe)
    state = stored(case)
    packed = packed_layers(case.denoiser)
    for layer in case.report.layers:
        name, shape = layer.name, packed[layer.name].float_shape
        weight, scale = state[f"{name}.weight"], state.get(f"{name}.weight_scale")
        if layer.reason:
            assert weight.dtype == torch.bfloat16
            assert scale is None
            continue
        rows, columns = shape
        if layer.form == "fp8":
            assert (weight.dtype, weight.shape) == (torch.float8_e4m3fn, (rows, columns))
            assert (scale.dtype, scale.shape) == (torch.float32, (rows,))
            assert torch.equal(bfl.dequantize_fp8r(weight, scale), packed[name].float_weight())
            continue
        outer, inputs = state[f"{name}.weight_scale_2"], state[f"{name}.input_scale"]
        assert (weight.dtype, weight.shape) == (torch.uint8, (rows, columns // 2))
        assert (scale.dtype, scale.shape) == (torch.float8_e4m3fn, (rows, columns // 16))
        assert outer.shape == inputs.shape == ()
        assert outer.dtype == inputs.dtype == torch.float32
        again = bfl.dequantize_nvfp4(weight, scale, outer)
        assert torch.equal(again, packed[name].float_weight())


@pytest.mark.parametrize("model", ["sd32", "sd3", "flux"])
@pytest.mark.parametrize("recipe", ["fp8", "nvfp4-a16-rtn"])
def test_diffusers_loads_bfl(exported: Exported, load: Callable, recipe: str, model: str) -> None:
    case = exported("bfl", recipe, model)
    kind = type(case.denoiser)
    loaded = kind.from_single_file(
        str(case.file),
        config=str(case.folder),
        subfolder=case.component,
        quantization_config=BFLQuantizationConfig(),
    )
    classes = {type(module).__name__ for module in loaded.modules()}
    assert classes & {"BFLFP8RLinear", "BFLNVFP4Linear"}
    _, plain = load(model, recipe)
    # It multiplies by the dequantized weights, in bfloat16.
    assert torch.equal(forward(loaded), forward(plain.dequantize()))


def test_from_pretrained_does_not_take_bfl_for_plain_weights(exported: Exported) -> None:
    case = exported("bfl", "fp8")
    with pytest.raises((TypeError, AttributeError)):
        type(case.denoiser).from_pretrained(case.folder, subfolder=case.component)


def test_bfl_says_where_diffusers_cannot_read_it(exported: Exported) -> None:
    assert "from_single_file(FILE" in exported("bfl", "fp8").report.loads
    assert "no from_single_file" in exported("bfl", "fp8", "dit64").report.loads


@pytest.mark.parametrize(
    ("recipe", "algorithms", "inputs"),
    [
        ("fp8", {"FP8_PER_CHANNEL_PER_TOKEN"}, False),
        ("nvfp4-rtn", {"NVFP4", "FP8_PER_CHANNEL_PER_TOKEN"}, True),
        ("nvfp4-a16-rtn", {"W4A16_NVFP4", "FP8_PER_CHANNEL_PER_TOKEN"}, False),
        ("mxfp8", {"MXFP8", "FP8_PER_CHANNEL_PER_TOKEN"}, False),
    ],
)
def test_modelopt_config(
    exported: Exported, recipe: str, algorithms: set[str], inputs: bool
) -> None:
    case = exported("modelopt", recipe)
    values, state = config(case), stored(case)
    assert values["quant_method"] == "modelopt"
    went = {layer.name for layer in case.report.layers if not layer.reason}
    if len(algorithms) == 1:
        assert values["quant_algo"] in algorithms
        assert "quantized_layers" not in values
    else:
        assert values["quant_algo"] == "MIXED_PRECISION"
        assert values["quantized_layers"].keys() == went
        assert {x["quant_algo"] for x in values["quantized_layers"].values()} == algorithms
        targets = [name for group in values["config_groups"].values() for name in group["targets"]]
        assert sorted(targets) == sorted(went)
    assert not went & set(values["ignore"])
    assert "conv_in" in values["ignore"]
    assert any(name.endswith("input_scale") for name in state) == inputs


def test_modelopt_layout_of_mxfp8(exported: Exported) -> None:
    case = exported("modelopt", "mxfp8")
    state = stored(case)
    blocks = [layer for layer in case.report.layers if layer.form == "mxfp8"]
    assert blocks
    for layer in blocks:
        weight, scale = state[f"{layer.name}.weight"], state[f"{layer.name}.weight_scale"]
        assert weight.dtype == torch.float8_e4m3fn
        assert (scale.dtype, scale.shape) == (torch.uint8, (len(weight), weight.shape[1] // 32))


@pytest.mark.parametrize("recipe", ["nvfp4-rtn", "mxfp8"])
def test_modelopt_reads_its_blocks(exported: Exported, recipe: str) -> None:
    qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor")
    case = exported("modelopt", recipe)
    state, packed = stored(case), packed_layers(case.denoiser)
    for layer in case.report.layers:
        if layer.reason or layer.form == "fp8":
            continue
        expected = packed[layer.name].float_weight()
        weight, scale = state[f"{layer.name}.weight"], state[f"{layer.name}.weight_scale"]
        outer = state.get(f"{layer.name}.weight_scale_2")
        kind = qtensor.MXFP8QTensor if outer is None else qtensor.NVFP4QTensor
        found = kind(expected.shape, torch.float32, weight).dequantize(
            torch.float32, scale=scale, double_scale=outer, block_sizes={-1: 16}
        )
        assert torch.equal(found, expected)


def test_mx_describes_convolutions(exported: Exported) -> None:
    case = exported("mx", "mxfp4-rtn")
    described, state = config(case)["layers"], stored(case)
    packed = packed_layers(case.denoiser)
    flat = [name for name in described if len(described[name]["shape"]) == 4]
    assert flat
    for name in flat:
        rows, *rest = described[name]["shape"]
        assert packed[name].float_shape == (rows, *rest)
        columns = torch.Size(rest).numel()
        assert state[f"{name}.weight"].shape == (rows, columns // 2)
        assert state[f"{name}.weight_scale"].shape == (rows, columns // 32)


@pytest.mark.parametrize("to", ["mx", "modelopt"])
def test_diffusers_refuses_what_it_cannot_read(exported: Exported, to: str) -> None:
    case = exported(to, "mxfp8")
    with pytest.raises((TypeError, ValueError)):
        type(case.denoiser).from_pretrained(case.folder, subfolder=case.component)


def test_everything_else_is_copied(exported: Exported, quantized: Callable) -> None:
    case, source = exported("mx", "mxfp8"), quantized("sd32", "mxfp8")
    files = {p.relative_to(source) for p in source.rglob("*") if p.is_file()}
    assert files == {p.relative_to(case.folder) for p in case.folder.rglob("*") if p.is_file()}
    for name in files:
        if name.parts[0] != case.component:
            assert (source / name).read_bytes() == (case.folder / name).read_bytes()
    pipe = DiffusionPipeline.from_pretrained(case.folder, unet=None)
    original = DiffusionPipeline.from_pretrained(source, unet=None)
    assert same_state(pipe.vae, original.vae)
