import pytest
import torch
from torch import nn

from dq.distance import relative_error
from dq.errors import DQError
from dq.nn.simulated import QuantLayer, segments, simulate
from dq.plan import LayerSpec
from dq.quantize import choose_scales, fake_quantize
from dq.spec import Granularity, TensorSpec
from tests.nn.layers import LAYERS, build, calibrated
from tests.specs import INPUTS, WEIGHTS

INT8 = TensorSpec("int8", Granularity("channel"))
STATIC = TensorSpec("int8", Granularity("tensor"), symmetric=False)
DYNAMIC = TensorSpec("int8", Granularity("token"), dynamic=True)

each = pytest.mark.parametrize("name", LAYERS)


def run(layer: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The float layer with another weight."""
    return torch.func.functional_call(layer, {"weight": weight}, (x,))


@pytest.mark.parametrize("name", ["linear", "grouped conv", "reflect conv"])
@pytest.mark.parametrize("spec", WEIGHTS, ids=str)
def test_the_output_is_that_of_the_rounded_weight(name: str, spec: TensorSpec) -> None:
    layer, x = build(name)
    simulated = simulate(layer, LayerSpec(spec))
    matrix = layer.weight.detach().flatten(1)
    rounded = fake_quantize(matrix, choose_scales(matrix, spec), spec).view(layer.weight.shape)
    assert torch.equal(simulated(x), run(layer, x, rounded))


@pytest.mark.parametrize("name", ["linear", "strided conv"])
@pytest.mark.parametrize("spec", INPUTS, ids=str)
def test_the_output_is_that_of_the_rounded_input(name: str, spec: TensorSpec) -> None:
    layer, x = build(name)
    simulated = calibrated(layer, x, LayerSpec(INT8, spec))
    # A row for each token of a linear, for each image of a convolution, for each pixel in groups.
    by_pixel = spec.granularity.kind == "group" and x.dim() == 4
    last = x.movedim(1, -1) if by_pixel else x
    matrix = x.flatten(1) if x.dim() == 4 and not by_pixel else last.reshape(-1, last.shape[-1])
    (quantizer,) = simulated.input_quantizers
    scales = choose_scales(matrix, spec) if spec.dynamic else quantizer.scales
    rounded = fake_quantize(matrix, scales, spec).view(last.shape)
    rounded = rounded.movedim(-1, 1) if by_pixel else rounded
    weight = simulated.weight_quantizer(layer.weight.detach().flatten(1)).view(layer.weight.shape)
    assert torch.equal(simulated(x), run(layer, rounded, weight))


@pytest.mark.parametrize("name", ["linear", "strided conv"])
@pytest.mark.parametrize("spec", [spec for spec in INPUTS if spec.dynamic][::4], ids=str)
@torch.no_grad()
def test_inputs_rounded_on_the_fly_compile_in_one_graph(name: str, spec: TensorSpec) -> None:
    """Cards have no kernel for some of these; a look at the values would break the graph."""
    torch._dynamo.reset()  # it counts compilations of the same code
    layer, x = build(name)
    simulated = simulate(layer, LayerSpec(INT8, spec))
    compiled = torch.compile(simulated, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(x), simulated(x)) < 1e-4


@each
@pytest.mark.parametrize("low", [None, STATIC, DYNAMIC], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eight_bits_are_close_and_keep_dtype_and_shape(name: str, low, dtype) -> None:
    layer, x = build(name, dtype)
    simulated = simulate(layer, LayerSpec(INT8, low))
    for quantizer in simulated.input_quantizers:
        if low is STATIC:
            quantizer.set_range(*torch.aminmax(x.float()))
    with torch.no_grad():
        y, expected = simulated(x), layer(x)
    assert y.dtype == dtype
    assert y.shape == expected.shape
    assert 0 < relative_error(y, expected) < 0.02


@each
def test_parameters_are_shared_and_learn(name: str) -> None:
    layer, x = build(name)
    simulated = calibrated(layer, x, LayerSpec(INT8, STATIC))
    assert simulated.weight is layer.weight
    assert simulated.bias is layer.bias
    x.requires_grad_()
    simulated(x).square().sum().backward()
    assert (layer.weight.grad != 0).all()
    assert x.grad.abs().sum() > 0
    assert isinstance(simulated, (QuantLayer, type(layer)))
    assert type(simulated).__mro__.index(QuantLayer) < type(simulated).__mro__.index(type(layer))


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_segments_have_ranges_of_their_own(name: str) -> None:
    layer, x = build(name)
    sizes = (2, layer.weight.shape[1] - 2)
    axis = -1 if name == "linear" else 1
    parts = list(x.split(sizes, axis))
    parts[1] = parts[1] * 1000
    x = torch.cat(parts, axis)
    apart = calibrated(layer, x, LayerSpec(INT8, STATIC, sizes))
    assert len(apart.input_quantizers) == 2
    scales = [float(quantizer.scales.scale) for quantizer in apart.input_quantizers]
    assert scales[1] > 100 * scales[0]
    first = apart.input_quantizers[0](parts[0].reshape(1, -1)).view(parts[0].shape)
    assert 0 < relative_error(first, parts[0]) < 0.2


@pytest.mark.parametrize(("splits", "sizes"), [((), (24,)), ((4, 20), (4, 20))])
def test_segments_without_splits_are_one(splits, sizes) -> None:
    layer, _ = build("linear")
    assert segments(layer, LayerSpec(INT8, STATIC, splits)) == sizes


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_splits_that_do_not_fit_are_refused(name: str) -> None:
    layer, _ = build(name)
    text = rf"input splits \(3, 4\) do not sum to its {24 if name == 'linear' else 8} channels"
    with pytest.raises(DQError, match=text):
        simulate(layer, LayerSpec(INT8, STATIC, (3, 4)))


def test_weights_that_are_not_finite_are_refused() -> None:
    layer, _ = build("linear")
    layer.weight.data[3, 4] = torch.nan
    with pytest.raises(DQError, match="not finite"):
        simulate(layer, LayerSpec(INT8))


def test_uncalibrated_static_inputs_ask_for_calibration() -> None:
    layer, x = build("linear")
    with pytest.raises(DQError, match="need a calibration first"):
        simulate(layer, LayerSpec(INT8, STATIC))(x)
