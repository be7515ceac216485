import dataclasses

import pytest
import torch
from torch import Tensor, nn

from dq.formats import formats
from dq.kernels import Arguments, Site, choose, copies, kernels, scaled_mm
from dq.kernels.sample import near
from dq.nn.packed import packed
from dq.nn.packed_layer import PackedLayer
from dq.packing import pack
from dq.plan import LayerSpec
from dq.quantize import choose_scales, quantize
from dq.spec import Granularity, TensorSpec
from tests.nn.layers import calibrated

SITE = Site("linear", "cuda", 16, 32, "fp8", "fp8")
REFUSED = [
    ({"device": "cpu"}, "it is a linear kernel for CUDA"),
    ({"kind": "conv2d"}, "it is a linear kernel for CUDA"),
    ({"weight": "int8"}, "it multiplies floats with a scale a row only"),
    ({"input": "float"}, "it multiplies floats with a scale a row only"),
    ({"rows": 24}, "it takes multiples of 16 only, not 32 -> 24"),
    ({"columns": 40}, "it takes multiples of 16 only, not 40 -> 16"),
]
# Every split of the bits whose levels are e4m3 ones, those with a name in the field among them.
SPLITS = [f"{u}e{e}m{m}" for u in ("", "u") for e in range(1, 8) for m in range(7)]
CONTAINED = [
    name
    for name in SPLITS
    if name in formats and torch.isin(formats[name].levels, formats["e4m3"].levels).all()
]
CHANNEL, TOKEN, TENSOR = (Granularity(kind) for kind in ("channel", "token", "tensor"))


def build(
    static: bool = False,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    name: str = "e4m3",
    low: str = "e4m3",
    tokens: int = 15,
) -> tuple[Tensor, Arguments]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 64, generator=generator).to(dtype)
    grid = formats[name]
    codes = grid.encode(torch.randn(48, 64, generator=generator) * grid.high / 4)
    return x, Arguments(
        weight=pack(codes, grid.bits),
        scale=torch.rand(48, generator=generator) / 100,
        bias=torch.randn(48, generator=generator).to(dtype) if bias else None,
        input_affine=torch.tensor([[2.24 / formats[low].high, 0.0]]) if static else None,
        weight_bits=grid.bits,
        columns=64,
        multiplier_bits=0,
        groups=0,
        input_bits=formats[low].bits,
        segments=[],
        weight_format=name,
        input_format=low,
    )


def on(device: str, a: Arguments) -> Arguments:
    return Arguments(*(v.to(device) if isinstance(v, Tensor) else v for v in a))


def restored(x: Tensor, a: Arguments) -> tuple[Tensor, Tensor]:
    """What inputs and weights stand for."""
    low, grid = formats[a.input_format], formats[a.weight_format]
    if a.input_affine is None:
        step = x.abs().amax(-1, keepdim=True).float() / low.high
    else:
        step = a.input_affine[0, 0]
    levels = grid.decode(scaled_mm.unpack(a.weight, a.weight_bits, a.columns))
    return low.round(x.float() / step) * step, levels * a.scale[:, None]


def agrees(y: Tensor, x: Tensor, a: Arguments) -> bool:
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], 48)
    if a.bias is not None:  # comes last, and is rounded once more in bfloat16
        y = y.double() - a.bias.double()
        slack = 0.0 if x.dtype == torch.float32 else 2.0**-8 * float(a.bias.abs().max() + 4)
        x, weight = restored(x, a)
        exact = x.double() @ weight.double().t()
        return bool(((y - exact).abs() <= 2.0**-7 * exact.abs() + slack + 1e-4).all())
    return near(y, *restored(x, a))


each = pytest.mark.parametrize("static", [True, False])
biased = pytest.mark.parametrize("bias", [True, False])
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)  # fmt: skip


@each
@biased
@dtypes
@pytest.mark.parametrize("name", ["e4m3", "e2m1", "e3m2"])
def test_the_product_is_that_of_restored_values(static: bool, bias: bool, dtype, name: str) -> None:
    x, a = build(static, bias, dtype, name)
    assert agrees(scaled_mm.linear(x, a), x, a)


@pytest.mark.parametrize("low", ["e2m1", "e2m3", "e3m2"])
@each
def test_inputs_of_fewer_bits_too(static: bool, low: str) -> None:
    x, a = build(static, name="e2m1", low=low)
    assert agrees(scaled_mm.linear(x, a), x, a)


def test_the_named_floats_are_among_them() -> None:
    assert {"e2m1", "e2m3", "e3m2", "e4m3"} <= set(CONTAINED)
    assert "ue4m3" not in CONTAINED  # reaches 480


@pytest.mark.parametrize("name", CONTAINED)
def test_codes_of_every_format_become_the_same_levels(name: str) -> None:
    _, a = build(name=name)
    levels = scaled_mm.e4m3_codes(a)
    assert levels.dtype == torch.float8_e4m3fn
    assert levels.shape == (48, 64)
    assert levels.is_contiguous()
    codes = scaled_mm.unpack(a.weight, a.weight_bits, a.columns)
    assert torch.equal(levels.float(), formats[name].decode(codes))


@pytest.mark.parametrize("tokens", [0, 1, 2, 17])
def test_any_number_of_tokens(tokens: int) -> None:
    x, a = build(tokens=tokens, name="e2m1")
    assert agrees(scaled_mm.linear(x, a), x, a)


def test_inputs_may_have_any_shape_and_layout() -> None:
    x, a = build(tokens=12, name="e2m1")
    y = scaled_mm.linear(x, a)
    assert torch.equal(scaled_mm.linear(x.view(2, 3, 2, 64), a), y.view(2, 3, 2, 48))
    assert torch.equal(scaled_mm.linear(x.t().contiguous().t(), a), y)


def test_rows_of_zeros_and_numbers_beyond_the_grid() -> None:
    x, a = build(static=True)
    x[0] = 0
    x[1] = 1e30
    assert agrees(scaled_mm.linear(x, a), x, a)
    x, a = build(static=False)
    x[0] = 0
    assert torch.equal(scaled_mm.linear(x, a)[0], a.bias)


@pytest.mark.parametrize(
    ("bias", "dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_the_output_has_the_dtype_of_the_input_whatever_the_bias(bias, dtype) -> None:
    x, a = build(dtype=dtype)
    a = a._replace(bias=a.bias.to(bias))
    assert agrees(scaled_mm.linear(x, a), x, a)


LOWS = [
    TensorSpec("e4m3", TOKEN, dynamic=True),
    TensorSpec("e2m1", TOKEN, dynamic=True),
    TensorSpec("e4m3", TENSOR),
    TensorSpec("ue3m3", TENSOR),
]


def layer_of(spec: LayerSpec, dtype: torch.dtype = torch.float32) -> tuple[PackedLayer, Tensor]:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 32).to(dtype), torch.randn(2, 9, 64).to(dtype)
    made = packed(layer, spec)
    made.load_layer(calibrated(layer, x, spec))
    return made, x


@pytest.mark.parametrize("low", LOWS, ids=str)
@pytest.mark.parametrize("name", ["e4m3", "e2m1", "e2m3", "e3m2"])
@torch.no_grad()
def test_a_packed_layer_computes_what_it_simulates(name: str, low: TensorSpec) -> None:
    layer, x = layer_of(LayerSpec(TensorSpec(name, CHANNEL), low))
    site = layer.site("cuda")
    assert (site.weight, site.input) == ("fp8", "fp8")
    y, expected = layer.run(kernels["scaled_mm"], x), layer.simulate(x, layer.bias)
    assert y.dtype == torch.float32
    assert ((y - expected).abs() <= 2.0**-8 * (expected - layer.bias).abs() + 1e-5).all()


@pytest.mark.parametrize("low", LOWS[:2], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_are_quantized_as_everywhere(low: TensorSpec, dtype) -> None:
    x = torch.randn(40, 64) * torch.logspace(-20, 6, 40).unsqueeze(1)
    x[3] = 0
    x = x.to(dtype)
    _, a = build(low=low.format)
    levels, step = scaled_mm._quantized(x, a)
    scales = choose_scales(x, low)
    assert torch.equal(step, scales.scale)
    codes = quantize(x, scales, low)
    assert torch.equal(levels.float(), low.grid.decode(codes))


def test_what_is_no_e4m3_or_has_other_scales_is_no_site_of_it() -> None:
    e4m3, static, dynamic = TensorSpec("e4m3", CHANNEL), LOWS[2], LOWS[0]
    others = [
        (LayerSpec(TensorSpec("e5m2", CHANNEL), dynamic), ("other", "fp8")),
        (LayerSpec(TensorSpec("e3m4", CHANNEL), dynamic), ("other", "fp8")),
        (LayerSpec(TensorSpec("e4m3", Granularity("group", 16)), dynamic), ("other", "fp8")),
        (LayerSpec(TensorSpec("nf4", CHANNEL), dynamic), ("other", "fp8")),
        (LayerSpec(e4m3, TensorSpec("e5m2", TOKEN, dynamic=True)), ("fp8", "other")),
        (LayerSpec(e4m3, dataclasses.replace(dynamic, observer="mse")), ("fp8", "other")),
        (LayerSpec(e4m3, static, (32, 32)), ("fp8", "other")),
        (LayerSpec(e4m3), ("fp8", "float")),
    ]
    for spec, kinds in others:
        site = packed(nn.Linear(64, 32), spec).site("cuda")
        assert (site.weight, site.input) == kinds, spec


def test_the_levels_of_shorter_codes_are_kept_if_they_may_be() -> None:
    x, a = build(name="e2m1")
    assert torch.equal(scaled_mm.linear(x, a._replace(keep=False)), scaled_mm.linear(x, a))
    assert copies.resident_bytes(a.weight) == 48 * 64
    _, a = build(name="e2m1")
    scaled_mm.linear(x, a._replace(keep=False))
    assert copies.resident_bytes(a.weight) == 0
    _, a = build(name="e4m3")  # these are multiplied where they lie
    scaled_mm.linear(x, a)
    assert copies.resident_bytes(a.weight) == 0


@torch.no_grad()
def test_what_is_kept_counts_as_resident_and_can_be_dropped() -> None:
    layer, x = layer_of(LayerSpec(TensorSpec("e2m1", CHANNEL), LOWS[0]))
    layer.run(kernels["scaled_mm"], x)
    assert layer.resident_bytes() == layer.stored_bytes()
    layer.keep(True)
    layer.run(kernels["scaled_mm"], x)
    assert layer.resident_bytes() == layer.stored_bytes() + 32 * 64
    layer.keep(False)
    assert layer.resident_bytes() == layer.stored_bytes()


@dtypes
def test_sizes_without_a_row_wise_kernel_are_scaled_afterwards(
    monkeypatch: pytest.MonkeyPatch, dtype
) -> None:
    x, a = build(dtype=dtype, name="e2m1")
    multiply = torch._scaled_mm

    def refuse(one, other, step, *rest, **options):
        if step.numel() > 1:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `...`")
        return multiply(one, other, step, *rest, **options)

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    assert agrees(scaled_mm.linear(x, a), x, a)


def test_other_errors_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "_scaled_mm", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        scaled_mm.linear(*build())


@pytest.mark.parametrize("name", ["e4m3", "e2m1"])
def test_the_graph_sees_one_product_with_the_true_shape(name: str) -> None:
    x, a = build(name=name)
    codes, step = scaled_mm._quantized(x, a)
    checks = ("test_schema", "test_faketensor")
    arguments = (codes.view(torch.uint8), step, *a)
    torch.library.opcheck(torch.ops.dq.scaled_mm.default, arguments, test_utils=checks)


@pytest.mark.parametrize("name", ["e4m3", "e2m1"])
@each
def test_a_compiled_layer_gives_the_same(static: bool, name: str) -> None:
    x, a = build(static, dtype=torch.bfloat16, name=name, low="e2m1")
    torch._dynamo.reset()
    compiled = torch.compile(scaled_mm.linear, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, a), scaled_mm.linear(x, a))


def test_the_self_test_knows_right_from_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    check, cpu = kernels["scaled_mm"].check, torch.device("cpu")
    assert check(cpu)
    multiply = torch._scaled_mm

    def wrong(codes, weight, *rest, **options):
        """Gets one element wrong, by one feature."""
        y = multiply(codes, weight, *rest, **options)
        weight = weight.float()
        y[3, 5] -= (codes[3, 7].float() * weight[7, 5] + 0.25).to(y.dtype)
        return y

    monkeypatch.setattr(torch, "_scaled_mm", wrong)
    assert not check(cpu)


@pytest.mark.parametrize(("change", "text"), REFUSED)
def test_what_it_refuses_and_why(change: dict[str, str], text: str) -> None:
    assert kernels["scaled_mm"].refuses(dataclasses.replace(SITE, **change)) == text


def test_the_card_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    refuses = kernels["scaled_mm"].refuses
    for card, text in [
        ((0, 0), "the card has no fp8 units"),
        ((8, 6), "the card has no fp8 units"),
        ((8, 9), None),
        ((9, 0), None),
        ((12, 0), None),
    ]:
        monkeypatch.setattr(scaled_mm, "capability", lambda card=card: card)
        assert refuses(SITE) == text


def test_it_is_never_chosen_on_a_cpu() -> None:
    assert choose(dataclasses.replace(SITE, device="cpu")) is None


@pytest.mark.gpu
@each
@biased
@dtypes
@pytest.mark.parametrize("name", ["e4m3", "e2m1"])
def test_the_product_on_cuda_is_that_of_restored_values(
    static: bool, bias: bool, dtype, name: str
) -> None:
    x, a = build(static, bias, dtype, name)
    x, a = x.cuda(), on("cuda", a)  # a scale found there may differ by a bit, and a tie then rounds
    assert agrees(scaled_mm.linear(x, a), x, a)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [0, 1, 2, 15, 31, 127, 257])
def test_any_number_of_tokens_on_cuda(tokens: int) -> None:
    x, a = build(tokens=tokens, name="e2m1")
    assert agrees(scaled_mm.linear(x.cuda(), on("cuda", a)).cpu(), x, a)


@pytest.mark.gpu
def test_it_is_chosen_on_a_card_that_has_it() -> None:
    if scaled_mm.capability() < (8, 9):
        pytest.skip("this card has no fp8 units")
    assert choose(SITE) is kernels["scaled_mm"]
    assert kernels["scaled_mm"].check(torch.device("cuda"))


@pytest.mark.gpu
def test_few_tokens_and_many_features_on_cuda() -> None:
    """The sizes that cuBLAS refuses by row on Hopper."""
    torch.manual_seed(0)
    spec = LayerSpec(TensorSpec("e4m3", CHANNEL), LOWS[0])
    layer = packed(nn.Linear(9216, 3072), spec)
    layer.load_layer(nn.Linear(9216, 3072))
    x = torch.randn(127, 9216)
    with torch.no_grad():
        expected = layer.simulate(x, layer.bias)
        y = layer.cuda().run(kernels["scaled_mm"], x.cuda()).cpu()
    assert (y - expected).norm() <= 2.0**-7 * expected.norm()
