"""The product itself needs Blackwell; a stand-in that reads the same bytes tests the rest."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import ScalingType, SwizzleType

from dq.formats import formats
from dq.kernels import Site, block_scaled, block_scales, choose, copies, kernels, scaled_mm
from dq.nn.packed import packed
from dq.nn.packed_layer import PackedLayer
from dq.plan import LayerSpec
from dq.presets import input_preset, weight_preset
from dq.spec import Granularity
from tests.nn.layers import calibrated

KINDS = ("nvfp4", "mxfp4", "mxfp8")
SITE = Site("linear", "cuda", 16, 32, "nvfp4", "nvfp4")
PAIRS = [  # weight, input, the kernel that is made for them
    ("nvfp4", "nvfp4", "nvfp4"),
    ("nvfp4-four-six", "nvfp4-four-six", "nvfp4"),
    ("nvfp4", "nvfp4-search", "nvfp4"),
    ("mxfp4", "mxfp4", "mxfp4"),
    ("mxfp4-floor", "mxfp4-search", "mxfp4"),
    ("mxfp8", "mxfp8", "mxfp8"),
    ("mxfp4", "mxfp8", "mxfp8"),
    ("mxfp6", "mxfp8-even", "mxfp8"),
    ("mxfp6-e3m2", "mxfp6", "mxfp8"),
    ("mxfp8", "mxfp4", "mxfp8"),
]
each = pytest.mark.parametrize(("weight", "low", "kind"), PAIRS)
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)  # fmt: skip


def restored(elements: Tensor, scales: Tensor, size: int) -> Tensor:
    """Read a matrix `(R, K)` as cuBLAS does, element by element and scale by scale."""
    if elements.dtype == torch.float4_e2m1fn_x2:
        raw = elements.view(torch.uint8)
        codes = torch.stack([raw & 15, raw >> 4], dim=-1).flatten(1)
        levels = formats["e2m1"].decode(codes)
    else:
        levels = elements.float()
    rows, columns = levels.shape
    blocks = -(-columns // size)
    assert scales.is_contiguous()
    assert scales.numel() == -(-rows // 128) * 128 * -(-blocks // 4) * 4
    r, b = torch.arange(rows)[:, None], torch.arange(columns)[None] // size
    tile = (r // 128) * -(-blocks // 4) + b // 4
    place = 512 * tile + 16 * (r % 32) + 4 * (r % 128 // 32) + b % 4
    return levels.double() * scales.float().flatten()[place].double()


def stand_in(
    mat_a: Tensor, mat_b: Tensor, *, scale_a: Tensor, scale_recipe_a: ScalingType, scale_b: Tensor,
    scale_recipe_b: ScalingType, swizzle_a: SwizzleType, swizzle_b: SwizzleType,
    output_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """What `scaled_mm` says it computes, on the CPU, and what it says it takes."""
    assert swizzle_a == swizzle_b == SwizzleType.SWIZZLE_32_4_4
    assert scale_recipe_a == scale_recipe_b
    assert mat_a.dtype == mat_b.dtype
    assert mat_a.is_contiguous()
    assert mat_b.t().is_contiguous()
    nv = scale_recipe_a == ScalingType.BlockWise1x16
    assert scale_a.dtype == scale_b.dtype == (torch.float8_e4m3fn if nv else torch.float8_e8m0fnu)
    size = 16 if nv else 32
    x, weight = restored(mat_a, scale_a, size), restored(mat_b.t(), scale_b, size)
    assert weight.shape[1] % 32 == 0
    assert weight.shape[0] % 16 == 0
    return (x @ weight.t()).to(output_dtype)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_scaled, "scaled_mm", stand_in)


def layer_of(
    weight: str, low: str, dtype: torch.dtype = torch.float32, bias: bool = True
) -> tuple[PackedLayer, Tensor]:
    """A layer with more than one tile of scales, and an input with blocks far apart."""
    torch.manual_seed(0)
    layer = nn.Linear(288, 144, bias=bias).to(dtype)
    layer.weight.data *= torch.exp(torch.randn(144, 18)).repeat_interleave(16, 1)
    x = torch.randn(2, 70, 288) * torch.exp(torch.randn(2, 70, 18)).repeat_interleave(16, 2)
    x[0, 3] = 0
    x = (x * torch.logspace(-2, 2, 70).view(1, -1, 1)).to(dtype)
    spec = LayerSpec(weight_preset(weight), input_preset(low, dynamic=True))
    made = packed(layer, spec)
    made.load_layer(calibrated(layer, x, spec))
    return made, x


def kernel(kind: str):
    return kernels[f"block_{kind}"]


@each
@torch.no_grad()
def test_a_packed_layer_computes_what_it_simulates(
    weight: str, low: str, kind: str, emulated: None
) -> None:
    layer, x = layer_of(weight, low)
    y, expected = layer.run(kernel(kind), x), layer.simulate(x, layer.bias)
    assert y.dtype == torch.float32
    # The product is rounded to bfloat16, and the bias comes last.
    size = (expected - layer.bias).abs()
    assert ((y - expected).abs() <= 2.0**-8 * size + 2e-6 * size.amax(-1, keepdim=True)).all()


@dtypes
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_dtypes_and_biases(kind: str, bias: bool, dtype: torch.dtype, emulated: None) -> None:
    layer, x = layer_of(kind, kind, dtype, bias)
    x = x / 100  # float16 ends at 65504
    y, expected = layer.run(kernel(kind), x), layer.simulate(x, layer.bias)
    assert y.dtype == dtype
    assert y.shape == expected.shape
    limit = 4e-3 if dtype == torch.float32 else 8e-3  # the simulation rounds its operands too
    assert (y - expected).float().norm() <= limit * expected.float().norm()


@each
def test_sites_say_what_the_layers_are(weight: str, low: str, kind: str) -> None:
    layer, _ = layer_of(weight, low)
    site = layer.site("cuda")
    assert site.weight == weight.split("-")[0].replace("mxfp6", "mxfp8")
    assert site.input == low.split("-")[0].replace("mxfp6", "mxfp8")
    assert layer.path("cpu") == "simulated"


@pytest.mark.parametrize(
    ("name", "size"), [("mxfp8-e5m2", 32), ("nvfp4", 32), ("mxfp4", 16), ("mxfp8", 64)]
)
def test_what_has_no_such_blocks_is_no_site_of_them(name: str, size: int) -> None:
    weight, low = (
        dataclasses.replace(each, granularity=Granularity("group", size))
        for each in (weight_preset(name), input_preset(name, dynamic=True))
    )
    site = packed(nn.Linear(64, 32), LayerSpec(weight, low)).site("cuda")
    assert (site.weight, site.input) == ("other", "other")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_any_number_of_tokens_in_any_layout(kind: str, emulated: None) -> None:
    layer, x = layer_of(kind, kind)
    a, run = layer.arguments(), kernel(kind).run
    y = run(x, a)
    assert torch.equal(run(x.flatten(0, 1), a).view(y.shape), y)
    assert torch.equal(run(x[0].t().contiguous().t(), a), y[0])
    for tokens in (0, 1, 31):
        assert torch.equal(run(x[0, :tokens], a), y[0, :tokens])


@pytest.mark.parametrize(
    ("weight", "kind", "keep", "expected"),
    [
        ("nvfp4", "nvfp4", False, 144 * 144 + 256 * 20),
        ("nvfp4", "nvfp4", True, 144 * 144 + 256 * 20),
        ("mxfp4", "mxfp4", False, 144 * 144 + 256 * 12),
        ("mxfp4", "mxfp8", False, 0),
        ("mxfp4", "mxfp8", True, 144 * 288 + 256 * 12),
        ("mxfp8", "mxfp8", True, 144 * 288 + 256 * 12),
        ("mxfp8", "mxfp8", False, 0),
    ],
)
@torch.no_grad()
def test_what_is_kept_beside_the_weight_is_counted(
    weight: str, kind: str, keep: bool, expected: int, emulated: None
) -> None:
    low = "mxfp8" if kind == "mxfp8" else kind
    layer, x = layer_of(weight, low)
    layer.keep(keep)
    assert layer.resident_bytes() == layer.stored_bytes()
    y = layer.run(kernel(kind), x)
    assert layer.resident_bytes() == layer.stored_bytes() + expected
    assert torch.equal(layer.run(kernel(kind), x), y)
    layer.keep(keep)
    assert copies.resident_bytes(layer.weight) == 0


@torch.no_grad()
def test_values_that_are_loaded_after_a_run_count(emulated: None) -> None:
    layer, x = layer_of("nvfp4", "nvfp4")
    before = layer.run(kernel("nvfp4"), x)
    other, _ = layer_of("nvfp4-nearest", "nvfp4")
    layer.load_state_dict(other.state_dict())
    after = layer.run(kernel("nvfp4"), x)
    assert not torch.equal(after, before)
    assert torch.equal(after, other.run(kernel("nvfp4"), x))


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_sees_one_product_with_the_true_shape(kind: str, emulated: None) -> None:
    layer, x = layer_of(kind, kind)
    a = layer.arguments()._replace(bias=None)
    low = block_scaled._blocks(x[0], kind, a)
    elements, scales = block_scaled._operand(low, kind, a.input_format)
    op, checks = torch.ops.dq.block_scaled.default, ("test_schema", "test_faketensor")
    torch.library.opcheck(op, (elements, scales, kind, *a), test_utils=checks)


@pytest.mark.parametrize(("kind", "rule"), [("nvfp4", "-four-six"), ("mxfp4", ""), ("mxfp8", "")])
@torch.no_grad()
def test_a_compiled_layer_gives_the_same(kind: str, rule: str, emulated: None) -> None:
    layer, x = layer_of(kind, kind + rule, torch.bfloat16)
    a, run = layer.arguments(), kernel(kind).run
    expected = run(x, a)
    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, a), expected)


# ---- self-tests and choice


def as_they_lie(scales: Tensor) -> Tensor:
    """Scales of the right number, but row by row."""
    size = block_scales.swizzled(scales).numel()
    return nn.functional.pad(scales.flatten(), (0, size - scales.numel()))


def odd_first(codes: Tensor) -> Tensor:
    return block_scales.pairs(codes.unflatten(1, (-1, 2)).flip(2).flatten(1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_self_test_passes_where_the_product_is_right(kind: str, emulated: None) -> None:
    assert kernel(kind).check(torch.device("cpu"))


@pytest.mark.parametrize(
    ("kind", "name", "wrong"),
    [
        *((kind, "swizzled", as_they_lie) for kind in KINDS),
        ("nvfp4", "pairs", odd_first),
        ("mxfp4", "pairs", odd_first),
    ],
)
def test_the_self_test_knows_a_wrong_product(
    kind: str, name: str, wrong, emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one operand only: elements that both have in another order would be the same sum."""
    real, calls = getattr(block_scales, name), []

    def second(x: Tensor) -> Tensor:
        calls.append(1)
        return wrong(x) if len(calls) == 2 else real(x)

    monkeypatch.setattr(block_scaled, name, second)
    assert not kernel(kind).check(torch.device("cpu"))
    assert len(calls) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_one_wrong_scale_is_found(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_off(*args: Tensor, scale_a: Tensor, **rest) -> Tensor:
        raw = scale_a.view(torch.uint8).clone()
        raw[515] += 8 if kind == "nvfp4" else 1  # twice as large
        return stand_in(*args, scale_a=raw.view(scale_a.dtype), **rest)

    monkeypatch.setattr(block_scaled, "scaled_mm", one_off)
    assert not kernel(kind).check(torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_build_without_the_product_is_not_trusted(kind: str) -> None:
    with pytest.raises((RuntimeError, ValueError)):  # as `choose` expects it
        kernel(kind).check(torch.device("cpu"))


@pytest.mark.parametrize(
    ("kind", "change", "text"),
    [
        *((kind, {"device": "cpu"}, "it is a linear kernel for CUDA") for kind in KINDS),
        ("nvfp4", {"kind": "conv2d"}, "it is a linear kernel for CUDA"),
        ("nvfp4", {"weight": "mxfp4"}, "it multiplies nvfp4 only"),
        ("nvfp4", {"input": "float"}, "it multiplies nvfp4 only"),
        ("mxfp4", {}, "it multiplies mxfp4 only"),
        ("mxfp8", {}, "it multiplies mxfp4 and mxfp8 only"),
        ("nvfp4", {"rows": 24}, "it takes multiples of 32 -> 16 only, not 32 -> 24"),
        ("nvfp4", {"columns": 48}, "it takes multiples of 32 -> 16 only, not 48 -> 16"),
    ],
)
def test_what_they_refuse_and_why(kind: str, change: dict[str, str], text: str) -> None:
    assert kernel(kind).refuses(dataclasses.replace(SITE, **change)) == text


@pytest.mark.parametrize(
    ("card", "served"),
    [((0, 0), ()), ((9, 0), ()), ((10, 0), KINDS), ((10, 3), KINDS), ((12, 0), ("nvfp4", "mxfp8"))],
)
def test_the_card_decides(
    card: tuple[int, int], served: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_scaled, "capability", lambda: card)
    for kind in KINDS:
        site = dataclasses.replace(SITE, weight=kind, input=kind)
        assert (kernel(kind).refuses(site) is None) == (kind in served)


def test_four_bits_that_no_card_multiplies_run_as_eight(
    emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = dataclasses.replace(SITE, device="cuda", weight="mxfp4", input="mxfp4")
    monkeypatch.setattr(block_scaled, "capability", lambda: (12, 0))
    monkeypatch.setattr("dq.kernels.kernel._trusted", lambda kernel, device: True)
    assert choose(site) is kernel("mxfp8")
    assert choose(site).path == "fp8 gemm (MXFP8, bf16 out)"
    monkeypatch.setattr(block_scaled, "capability", lambda: (10, 0))
    assert choose(site) is kernel("mxfp4")


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_never_chosen_on_a_cpu(kind: str) -> None:
    assert choose(dataclasses.replace(SITE, device="cpu", weight=kind, input=kind)) is None


# ---- on the card itself


def needs(kind: str) -> None:
    refusal = kernel(kind).refuses(dataclasses.replace(SITE, weight=kind, input=kind))
    if refusal:
        pytest.skip(refusal)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_the_self_test_passes_on_cuda(kind: str) -> None:
    needs(kind)
    assert scaled_mm.capability() >= (10, 0)
    assert kernel(kind).check(torch.device("cuda"))


@pytest.mark.gpu
@each
@dtypes
@torch.no_grad()
def test_a_layer_on_cuda_computes_what_it_simulates(
    weight: str, low: str, kind: str, dtype: torch.dtype
) -> None:
    needs(kind)
    layer, x = layer_of(weight, low, dtype)
    x = x / 100
    expected = layer.simulate(x, layer.bias)
    y = layer.cuda().run(kernel(kind), x.cuda()).cpu()
    assert (y - expected).float().norm() <= 8e-3 * expected.float().norm()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [0, 1, 2, 31, 127, 129])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_any_number_of_tokens_on_cuda(kind: str, tokens: int) -> None:
    needs(kind)
    layer, x = layer_of(kind, kind)
    x = x.flatten(0, 1)[:tokens]
    expected = layer.simulate(x, layer.bias) if tokens else torch.zeros(0, 144)
    y = layer.cuda().run(kernel(kind), x.cuda()).cpu()
    assert y.shape == expected.shape
    assert (y - expected).norm() <= 4e-3 * expected.norm()
