import copy

import pytest
import torch
from torch import nn

from dq.distance import relative_error
from dq.errors import DQError
from dq.nn.packed import packed
from dq.nn.packed_layer import PackedLayer
from dq.nn.stored import COMPANIONS, TENSORS
from dq.plan import LayerSpec
from dq.presets import weight_preset
from dq.spec import Granularity, TensorSpec
from tests.nn.layers import LAYERS, build, calibrated
from tests.specs import WEIGHTS, layer_specs

STATIC = TensorSpec("int8", Granularity("tensor"), symmetric=False)
DYNAMIC = TensorSpec("int8", Granularity("token"), dynamic=True)
W4A8 = LayerSpec(weight_preset("int4-g8"), STATIC)

each = pytest.mark.parametrize("name", LAYERS)


def pack(name: str, spec: LayerSpec, dtype: torch.dtype = torch.float32):
    """A packed layer, the simulated one that it was made from, and an input."""
    layer, x = build(name, dtype)
    simulated = calibrated(layer, x, spec)
    made = packed(layer, spec)
    made.load_layer(simulated)
    return made, simulated, x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", layer_specs(), ids=str)
def test_packed_layers_equal_the_simulated_ones(spec: LayerSpec, dtype: torch.dtype) -> None:
    for name in LAYERS:
        made, simulated, x = pack(name, spec, dtype)
        with torch.no_grad():
            y, expected = made(x), simulated(x)
        assert y.dtype == dtype, name
        assert y.shape == expected.shape, name
        # In bfloat16 the simulation rounds its operands, integer kernels do not.
        limit = 1e-5 if dtype == torch.float32 else 8e-3
        assert relative_error(y, expected) <= limit, name


@pytest.mark.parametrize("name", ["linear", "conv"])
@pytest.mark.parametrize(
    "weight", [weight_preset("int8"), weight_preset("int4-g8"), WEIGHTS[0]], ids=str
)
@pytest.mark.parametrize("format", ["int8", "int5", "e4m3"])
def test_segments_survive_packing(name: str, weight: TensorSpec, format: str) -> None:
    low = TensorSpec(format, Granularity("tensor"), symmetric=format == "e4m3")
    channels = build(name)[0].weight.shape[1]
    made, simulated, x = pack(name, LayerSpec(weight, low, (1, channels - 1)))
    assert made.input_affine.shape == (2, 2)
    with torch.no_grad():
        assert relative_error(made(x), simulated(x)) <= 1e-5


@pytest.mark.parametrize("spec", [LayerSpec(w) for w in WEIGHTS], ids=str)
def test_the_float_weight_is_the_simulated_one_bit_for_bit(spec: LayerSpec) -> None:
    for name in LAYERS:
        made, simulated, _ = pack(name, spec)
        matrix = simulated.weight.detach().flatten(1)
        expected = simulated.weight_quantizer(matrix).view(simulated.weight.shape)
        assert torch.equal(made.float_weight(), expected), name


@pytest.mark.parametrize("spec", layer_specs(), ids=str)
def test_stored_bytes_are_those_that_the_spec_promises(spec: LayerSpec) -> None:
    for name in ("linear", "strided conv"):
        layer, _ = build(name)
        made = packed(layer, spec)
        bias = 0 if made.bias is None else made.bias.numel() * 4
        assert made.stored_bytes() - bias == spec.bytes(made.rows, made.columns), name
        assert made.resident_bytes() == made.stored_bytes(), name


@each
def test_layers_remain_what_the_model_expects(name: str) -> None:
    made, _, _ = pack(name, W4A8)
    layer, _ = build(name)
    assert isinstance(made, type(layer))
    assert {n for n, _ in made.named_parameters()} == {n for n, _ in layer.named_parameters()}
    assert type(made.weight.data) is torch.Tensor
    assert set(made.state_dict()) <= {*TENSORS, "bias"}
    assert str(W4A8) in repr(made)


@each
@pytest.mark.parametrize("spec", [W4A8, LayerSpec(weight_preset("int8"), DYNAMIC)], ids=str)
def test_state_dicts_carry_everything(name: str, spec: LayerSpec) -> None:
    made, _, x = pack(name, spec)
    layer, _ = build(name)
    other = packed(layer, spec)
    other.load_state_dict(made.state_dict(), strict=True)
    assert torch.equal(other(x), made(x))
    meta = packed(layer, spec, torch.device("meta"))
    assert all(tensor.is_meta for tensor in meta.state_dict().values())
    meta.load_state_dict(made.state_dict(), strict=True, assign=True)
    assert torch.equal(meta(x), made(x))


def test_values_that_are_loaded_after_a_run_count() -> None:
    made, _, x = pack("conv", W4A8)
    made(x)
    layer, _ = build("conv")
    layer.weight.data.mul_(torch.linspace(1, 2, len(layer.weight)).view(-1, 1, 1, 1))
    other = packed(layer, W4A8)
    other.load_layer(calibrated(layer, x, W4A8))
    made.load_state_dict(other.state_dict())
    assert torch.equal(made(x), other(x))


CASTS = {
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "half": (lambda m: m.half(), torch.float16),
    "to": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "to device and dtype": (lambda m: m.to("cpu", torch.float16), torch.float16),
    "and back": (lambda m: m.bfloat16().float(), torch.float32),
    "nothing": (lambda m: m.to("cpu"), torch.float32),
}


@each
@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("spec", [W4A8, LayerSpec(WEIGHTS[1])], ids=str)
def test_casts_change_bias_and_inputs_but_never_codes_and_scales(
    name: str, cast: str, spec: LayerSpec
) -> None:
    made, _, x = pack(name, spec)
    before = {n: t.clone() for n, t in made.state_dict().items() if n in TENSORS}
    run, dtype = CASTS[cast]
    model = nn.Sequential(made)
    run(model)
    for tensor_name, tensor in before.items():
        after = getattr(made, tensor_name)
        assert after.dtype == tensor.dtype
        assert torch.equal(after, tensor)
    assert made.compute_dtype == dtype
    assert made.bias is None or made.bias.dtype == dtype
    assert model(x.to(dtype)).dtype == dtype


@pytest.mark.parametrize(
    "cast",
    [lambda m: m.type(torch.float32), lambda m: m._apply(lambda t: t.to(torch.int32))],
)
def test_codes_are_never_cast_and_a_refusal_changes_nothing(cast) -> None:
    made, _, x = pack("linear", W4A8)
    expected = made(x)
    with pytest.raises(DQError, match=r"packed codes cannot be cast to .*; call dequantize\(\)"):
        cast(made)
    assert made.weight.dtype == torch.uint8
    assert torch.equal(made(x), expected)


def test_moves_to_another_device_keep_the_dtypes() -> None:
    made, _, _ = pack("linear", W4A8)
    dtypes = {name: tensor.dtype for name, tensor in made.state_dict().items()}
    made.to("meta")
    assert all(tensor.is_meta for tensor in made.state_dict().values())
    assert {name: tensor.dtype for name, tensor in made.state_dict().items()} == dtypes


@pytest.mark.parametrize(
    ("name", "spec", "path"),
    [
        ("linear", W4A8, "int8 gemm (oneDNN)"),
        ("linear", LayerSpec(weight_preset("int8"), DYNAMIC), "int8 gemm (oneDNN)"),
        ("conv", W4A8, "int8 conv (oneDNN)"),
        ("linear", LayerSpec(weight_preset("int4-g8")), "unpack to float32, stock kernel"),
        ("same conv", W4A8, "simulated"),
        ("reflect conv", W4A8, "simulated"),
        ("linear", LayerSpec(TensorSpec("int4", Granularity("group", 8)), STATIC), "simulated"),
        ("linear", LayerSpec(TensorSpec("e4m3", Granularity("channel")), STATIC), "simulated"),
    ],
    ids=str,
)
def test_layers_say_what_they_really_compute(name: str, spec: LayerSpec, path: str) -> None:
    assert pack(name, spec)[0].path() == path


def test_the_path_names_the_dtype_that_is_unpacked_to() -> None:
    made, _, _ = pack("linear", LayerSpec(weight_preset("int4-g8")))
    assert made.bfloat16().path() == "unpack to bfloat16, stock kernel"


def test_float_layers_are_packed_without_calibration_if_the_spec_needs_none() -> None:
    layer, x = build("linear")
    spec = LayerSpec(weight_preset("int4-g8"), DYNAMIC)
    made = packed(layer, spec)
    made.load_layer(layer)
    expected, _, _ = pack("linear", spec)
    assert torch.equal(made(x), expected(x))


@pytest.mark.parametrize("simulate_first", [True, False])
def test_static_layers_are_not_packed_without_a_range(simulate_first: bool) -> None:
    from dq.nn.simulated import simulate

    layer, _ = build("linear")
    made = packed(layer, W4A8)
    with pytest.raises(DQError, match="need a calibration first"):
        made.load_layer(simulate(layer, W4A8) if simulate_first else layer)


def test_training_mode_and_gradient_flags_are_kept() -> None:
    layer, x = build("linear")
    layer.eval()
    layer.bias.requires_grad_(False)
    simulated = calibrated(layer, x, W4A8).eval()
    made = packed(layer, W4A8)
    made.load_layer(simulated)
    assert not made.training
    assert not any(p.requires_grad for p in made.parameters())


def test_copies_are_independent() -> None:
    made, _, x = pack("conv", W4A8)
    expected = made(x)
    twin = copy.deepcopy(made)
    twin.weight.data.zero_()
    assert torch.equal(made(x), expected)
    assert not torch.equal(twin(x), expected)
    assert isinstance(twin, PackedLayer)


def test_companions_are_what_plain_layers_do_not_have() -> None:
    assert set(TENSORS) == {"weight", *COMPANIONS}
    assert not set(COMPANIONS) & set(nn.Linear(1, 1).state_dict())
