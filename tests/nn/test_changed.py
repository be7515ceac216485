"""Layers whose input is changed before it is quantized: float, simulated, packed, stored."""

from __future__ import annotations

import copy
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from dq.distance import relative_error
from dq.engine import quantize
from dq.errors import DQError
from dq.integration import attach
from dq.method import Job, Method
from dq.methods.ptq import PTQ
from dq.nn import QuantLayer, packed_layers
from dq.nn.changed import changed_bias, conv_groups, convolved, entered, padded
from dq.nn.layers import input_channels
from dq.nn.packed import packed
from dq.nn.packed_layer import PackedLayer
from dq.nn.simulated import simulate
from dq.nn.stored import COMPANIONS
from dq.plan import LayerSpec, Plan
from dq.presets import input_preset, weight_preset
from dq.recipe import Recipe
from dq.spec import TensorSpec
from dq.transform import NO_TRANSFORM, Transform, TransformSpec
from tests.models import MODELS
from tests.nn.layers import LAYERS, build
from tests.packed import forward, same_state
from tests.sources import Samples
from tests.transforms import KINDS, transform

STATIC, DYNAMIC = input_preset("int8", dynamic=False), input_preset("int8", dynamic=True)
INT8, INT4 = weight_preset("int8"), weight_preset("int4-g8")
SPECS: dict[str, tuple[TensorSpec, TensorSpec | None]] = {
    "int8 static": (INT8, STATIC),
    "int8 dynamic": (INT8, DYNAMIC),
    "int4 static": (INT4, STATIC),
    "int4 dynamic": (INT4, DYNAMIC),
    "int4 float": (INT4, None),
    "int5 static": (weight_preset("int5"), input_preset("int5", dynamic=False)),
    "e4m3 dynamic": (weight_preset("e4m3"), input_preset("e4m3", dynamic=True)),
    "blocks": (weight_preset("e2m1-g8"), input_preset("e2m1-g8", dynamic=True)),
}
MORE_LAYERS = {
    "even same conv": (lambda: nn.Conv2d(8, 4, 4, padding="same"), (2, 8, 6, 5)),
    "valid conv": (lambda: nn.Conv2d(8, 4, 3, padding="valid"), (1, 8, 6, 5)),
    "circular conv": (
        lambda: nn.Conv2d(8, 4, 3, stride=2, padding=(2, 1), padding_mode="circular"),
        (2, 8, 6, 5),
    ),
    "wide conv": (lambda: nn.Conv2d(16, 6, (3, 5), padding=(1, 2), groups=2), (2, 16, 6, 5)),
}

each = pytest.mark.parametrize("name", LAYERS)
each_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
each_spec = pytest.mark.parametrize("spec", SPECS)


def made(
    name: str, kind: TransformSpec, spec: str, dtype: torch.dtype = torch.float32
) -> tuple[nn.Linear | nn.Conv2d, QuantLayer, PackedLayer, Tensor]:
    """Return a float layer, its simulated and packed forms, and an input."""
    layer, x = build(name, dtype)
    changed = transform(kind, input_channels(layer))
    weight, low = SPECS[spec]
    layer_spec = LayerSpec(weight, low, transform=kind)
    simulated = simulate(layer, layer_spec, transform=changed)
    if layer_spec.is_static:
        low_end, high_end = torch.aminmax(entered(layer, x, changed).float())
        simulated.set_input(0.8 * low_end.view(1), 0.8 * high_end.view(1))  # some saturate
    stored = packed(layer, layer_spec)
    stored.load_layer(simulated)
    return layer, simulated, stored, x


@torch.no_grad()
@given(
    st.sampled_from([*LAYERS, *MORE_LAYERS]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0, 2, 4, 8]),
    st.integers(0, 999),
)
def test_without_quantization_nothing_changes(
    name: str, shift: bool, scale: bool, rotation: int, seed: int
) -> None:
    if name in LAYERS:
        layer, x = build(name)
    else:
        make, shape = MORE_LAYERS[name]
        layer, x = make(), torch.randn(shape)
    changed = NO_TRANSFORM
    if shift or scale or rotation:
        kind = TransformSpec(shift, scale, rotation)
        changed = transform(kind, input_channels(layer), seed)
    groups = conv_groups(layer)
    operand = entered(layer, x, changed)
    weight = changed.weight(layer.weight, groups)
    bias = changed_bias(layer.weight, layer.bias, changed, groups)
    if isinstance(layer, nn.Linear):
        y = F.linear(operand, weight, bias)
    else:
        layer.transform = changed  # type: ignore[assignment]
        y = convolved(layer, operand, weight, bias)
    expected = layer(x)
    assert y.shape == expected.shape
    assert relative_error(y, expected) < 2e-6
    torch.testing.assert_close(changed.restored(weight, groups), layer.weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in (*LAYERS, *MORE_LAYERS) if "conv" in n])
def test_padding_gives_the_border_that_the_convolution_would(name: str) -> None:
    if name in LAYERS:
        layer, x = build(name)
    else:
        make, shape = MORE_LAYERS[name]
        layer, x = make(), torch.randn(shape)
    y = F.conv2d(padded(layer, x), layer.weight, layer.bias, layer.stride, 0, layer.dilation,
                 layer.groups)  # fmt: skip
    torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-6)


@each_kind
def test_eight_bits_are_close_to_the_float_layer(kind: TransformSpec) -> None:
    for name in LAYERS:
        layer, x = build(name)
        changed = transform(kind, input_channels(layer))
        simulated = simulate(layer, LayerSpec(INT8, DYNAMIC, transform=kind), transform=changed)
        with torch.no_grad():
            assert 0 < relative_error(simulated(x), layer(x)) < 0.05, name


def check_packed(kind: TransformSpec, spec: str, dtype: torch.dtype, limit: float) -> None:
    for name in LAYERS:
        _, simulated, stored, x = made(name, kind, spec, dtype)
        with torch.no_grad():
            y, expected = stored(x), simulated(x)
            assert y.dtype == dtype
            assert y.shape == expected.shape
            assert relative_error(y, expected) <= limit, name
            assert torch.equal(stored.float_weight(), simulated.rounded_weight()), name


@pytest.mark.parametrize("spec", ["int8 static", "int8 dynamic", "int4 static", "int4 float"])
@each_kind
def test_packed_layers_equal_the_simulated_ones(kind: TransformSpec, spec: str) -> None:
    check_packed(kind, spec, torch.float32, 1e-5)


@each_spec
@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.005)],
    ids=str,
)
def test_so_they_do_in_all_formats_and_dtypes(dtype: torch.dtype, limit: float, spec: str) -> None:
    check_packed(TransformSpec(True, True, 8), spec, dtype, limit)


@pytest.mark.parametrize("spec", ["int8 static", "int8 dynamic", "int4 static", "int4 dynamic"])
@each
def test_integer_kernels_serve_changed_layers(name: str, spec: str) -> None:
    layer, _ = build(name)
    weight, low = SPECS[spec]
    plain = packed(layer, LayerSpec(weight, low)).path("cpu")
    assert plain != "simulated" or name in ("same conv", "reflect conv")
    for kind in KINDS:
        path = made(name, kind, spec)[2].path()
        # Kernels know no such padding; what is shifted has been padded before.
        padded_before = kind.shift and plain == "simulated"
        assert path == ("int8 conv (oneDNN)" if padded_before else plain), kind


@pytest.mark.parametrize("name", ["linear without bias", "strided conv"])
@pytest.mark.parametrize("spec", ["int8 static", "int4 float"])
def test_a_shift_brings_a_bias_where_there_is_none(name: str, spec: str) -> None:
    kind = TransformSpec(shift=True)
    layer, simulated, stored, x = made(name, kind, spec)
    assert layer.bias is None
    shift = simulated.transform.shift
    assert shift is not None
    # What becomes zero, which every grid has.
    zero = shift.view(1, -1, 1, 1).expand(x.shape) if x.dim() == 4 else shift.expand(x.shape)
    with torch.no_grad():
        for quantized in (simulated, stored):
            assert relative_error(quantized(zero), layer(zero)) < 1e-5
    assert stored.bias is not None
    assert "bias" in stored.state_dict()


@each_spec
@each_kind
def test_stored_bytes_are_those_that_the_spec_promises(kind: TransformSpec, spec: str) -> None:
    for name in LAYERS:
        layer, _ = build(name)
        weight, low = SPECS[spec]
        empty = packed(layer, LayerSpec(weight, low, transform=kind), torch.device("meta"))
        bias = 0 if empty.bias is None else empty.bias.nbytes
        promised = empty.spec.bytes(empty.rows, empty.columns, input_channels(layer))
        assert empty.stored_bytes() - bias == promised, name
    stored = made("grouped conv", kind, spec)[2]
    empty = packed(build("grouped conv")[0], stored.spec, torch.device("meta"))
    assert stored.stored_bytes() == empty.stored_bytes()


@each_spec
@each_kind
def test_specs_survive_json(kind: TransformSpec, spec: str) -> None:
    weight, low = SPECS[spec]
    layer = LayerSpec(weight, low, transform=kind)
    plan = Plan("Net", {"a": layer, "b": dataclasses.replace(layer, transform=None), "c": layer})
    text = json.dumps(plan.to_dict())
    assert Plan.from_dict(json.loads(text)) == plan
    assert len(json.loads(text)["specs"]) == 2
    assert str(kind) in str(layer)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"shfit": True}, r"specs\[0\]: unknown key of a transform 'shfit'. Did you mean 'shift'"),
        ({"rotation": 3}, r"specs\[0\]: a rotation has blocks of 2, 4, 8, ... channels, not 3"),
        ({}, r"specs\[0\]: a transform without shift, scale and rotation does nothing"),
    ],
)
def test_transforms_are_read_strictly(values: dict[str, Any], text: str) -> None:
    written = Plan("Net", {"a": LayerSpec(INT8)}).to_dict()
    written["specs"][0]["transform"] = values
    with pytest.raises(DQError, match=text):
        Plan.from_dict(written)


@each_kind
def test_state_dicts_carry_everything(kind: TransformSpec) -> None:
    for name in LAYERS:
        layer, _, stored, x = made(name, kind, "int4 static")
        assert ("input_shift" in stored.state_dict()) is kind.shift
        assert ("input_scale" in stored.state_dict()) is kind.scale
        for device in (None, torch.device("meta")):
            other = packed(layer, stored.spec, device)
            other.load_state_dict(stored.state_dict(), strict=True, assign=device is not None)
            assert torch.equal(other(x), stored(x)), name
        assert torch.equal(copy.deepcopy(stored)(x), stored(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each
def test_casts_leave_the_transform_alone(name: str, dtype: torch.dtype) -> None:
    layer, _, stored, x = made(name, TransformSpec(True, True, 4), "int8 dynamic")
    before = {n: getattr(stored, n).clone() for n in ("input_shift", "input_scale")}
    with torch.no_grad():
        expected = layer(x)
        nn.Sequential(stored).to(dtype)
        for tensor_name, tensor in before.items():
            after = getattr(stored, tensor_name)
            assert after.dtype == torch.float32
            assert torch.equal(after, tensor)
        y = stored(x.to(dtype))
    assert y.dtype == dtype
    assert relative_error(y, expected) < 0.06


@each
def test_gradients_of_adapters_pass_through(name: str) -> None:
    for kind in KINDS:
        _, simulated, stored, x = made(name, kind, "int8 dynamic")
        gradients = []
        for quantized in (simulated, stored):
            mine = x.clone().requires_grad_()
            quantized(mine).square().sum().backward()
            assert mine.grad is not None
            gradients.append(mine.grad)
        assert relative_error(gradients[1], gradients[0]) < 1e-3, kind


def test_what_does_not_go_together_is_refused() -> None:
    turned, scaled = TransformSpec(rotation=4), TransformSpec(scale=True)
    for kind in (turned, scaled):
        with pytest.raises(DQError, match="a layer has kept tokens or a transform, not both"):
            LayerSpec(INT8, STATIC, kept_every=7, transform=kind)
    with pytest.raises(DQError, match="a rotation would mix the channels of input_splits"):
        LayerSpec(INT8, STATIC, (4, 4), transform=turned)
    assert LayerSpec(INT8, STATIC, (4, 4), transform=scaled).transform == scaled


@pytest.mark.parametrize("given", [NO_TRANSFORM, Transform(rotation=4), Transform(torch.ones(24))])
def test_layers_want_the_numbers_that_their_spec_speaks_of(given: Transform) -> None:
    layer, _ = build("linear")
    spec = LayerSpec(INT8, transform=TransformSpec(scale=True))
    with pytest.raises(DQError, match="input is to be scaled, and no numbers are there for it"):
        simulate(layer, spec, transform=given)
    with pytest.raises(DQError, match="input is to be scaled, and no numbers are there for it"):
        packed(layer, spec).load_layer(layer)


def test_rotations_need_no_numbers() -> None:
    layer, x = build("linear")
    spec = LayerSpec(INT4, DYNAMIC, transform=TransformSpec(rotation=8))
    stored = packed(layer, spec)
    stored.load_layer(layer)
    assert torch.equal(stored(x), made("linear", TransformSpec(rotation=8), "int4 dynamic")[2](x))


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_segments_have_ranges_of_their_own_after_the_change(name: str) -> None:
    layer, x = build(name)
    channels = input_channels(layer)
    changed = transform(TransformSpec(True, True), channels)
    spec = LayerSpec(INT8, STATIC, (2, channels - 2), transform=changed.spec)
    simulated = simulate(layer, spec, transform=changed)
    parts = entered(layer, x, changed).split(simulated.sizes, simulated.axis)
    ends = [torch.aminmax(part) for part in parts]
    simulated.set_input(torch.stack([e.min for e in ends]), torch.stack([e.max for e in ends]))
    stored = packed(layer, spec)
    stored.load_layer(simulated)
    with torch.no_grad():
        assert relative_error(stored(x), simulated(x)) <= 1e-5
        assert relative_error(stored(x), layer(x)) < 0.05


@dataclass(frozen=True)
class Changes(Method):
    """Gives every layer that may have one a transform, of each kind in turn."""

    def decide(self, job: Job) -> Plan:
        layers = {}
        for index, (name, spec) in enumerate(job.plan.layers.items()):
            kind = KINDS[index % len(KINDS)]
            channels = input_channels(job.model.get_submodule(name))  # type: ignore[arg-type]
            if kind.rotation and (spec.input_splits or channels % kind.rotation):
                kind = TransformSpec(shift=True, scale=True)
            job.transforms[name] = transform(kind, channels, index)
            layers[name] = dataclasses.replace(spec, transform=kind)
        return dataclasses.replace(job.plan, layers=layers)


def changed_model(name: str, weights: str, inputs: str, dynamic: str) -> tuple[Any, Plan]:
    """Return a quantized tiny model whose inputs are changed, known to diffusers as such."""
    model: Any = MODELS[name].network(MODELS[name].build())
    ptq = PTQ(weights, inputs, dynamic=dynamic, input_observer="absmax")
    plan = quantize(model, Recipe("changed", (ptq, Changes())), Samples(model, 2))
    attach(model, plan)
    return model, plan


CASES = [
    ("sd32", "int8", "int8", "static"),
    ("dit64", "int8", "int8", "static"),
    ("sd3", "int4", "int8", "dynamic"),
    ("flux", "nvfp4", "float", "dynamic"),
]
models = pytest.mark.parametrize(("name", "weights", "inputs", "dynamic"), CASES)


def companions(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{leaf}": tensor
        for name, layer in packed_layers(model).items()
        for leaf in (*COMPANIONS, "weight")
        if (tensor := getattr(layer, leaf)) is not None
    }


@models
def test_models_are_saved_and_reloaded_bit_for_bit(
    name: str, weights: str, inputs: str, dynamic: str, tmp_path: Path
) -> None:
    model, plan = changed_model(name, weights, inputs, dynamic)
    original = MODELS[name].network(MODELS[name].build())
    changed = {n: s.transform for n, s in plan.layers.items() if s.transform is not None}
    assert len({*changed.values()}) > 4
    stored = companions(model)
    assert any(n.endswith("input_shift") for n in stored)
    assert any(n.endswith("input_scale") for n in stored)
    # Ranges are those of the changed input: of others, most of it would saturate.
    error = relative_error(forward(model), forward(original))
    assert 0 < error < (0.2 if weights == "int8" else 0.4)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config["quantization_config"].plan == plan
    assert same_state(again, model)
    assert torch.equal(forward(again), forward(model))
    for dtype in (torch.bfloat16, torch.float16):
        half = type(model).from_pretrained(tmp_path, torch_dtype=dtype)
        assert half.dtype == dtype
        found = companions(half)
        assert found.keys() == stored.keys()
        for tensor_name, tensor in found.items():
            assert tensor.dtype == stored[tensor_name].dtype
            assert torch.equal(tensor, stored[tensor_name]), tensor_name
        assert relative_error(forward(half), forward(original)) < error + 0.1
    again.bfloat16()
    for tensor_name, tensor in companions(again).items():
        assert torch.equal(tensor, stored[tensor_name]), tensor_name


@models
def test_dequantized_they_are_ordinary_models(
    name: str, weights: str, inputs: str, dynamic: str, tmp_path: Path
) -> None:
    model, plan = changed_model(name, weights, inputs, dynamic)
    original = MODELS[name].network(MODELS[name].build())
    model.dequantize()
    assert not packed_layers(model)
    state, before = model.state_dict(), original.state_dict()
    assert state.keys() == before.keys()
    least = 0.05 if weights == "int8" else 0.3
    for layer, spec in plan.layers.items():
        if spec.transform is None:
            continue  # its change is in the norm before it
        error = relative_error(state[f"{layer}.weight"], before[f"{layer}.weight"])
        assert 0 < error < least, layer
        if f"{layer}.bias" in before:
            found, wanted = state[f"{layer}.bias"], before[f"{layer}.bias"]
            assert (found - wanted).abs().max() < 0.5 * least * state[f"{layer}.weight"].abs().sum()
    assert relative_error(forward(model), forward(original)) < 1.5 * least
    model.save_pretrained(tmp_path)
    assert same_state(type(model).from_pretrained(tmp_path), model)
