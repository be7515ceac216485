import pytest
import torch
from torch import Tensor

from dq.formats import formats
from dq.kernels import Arguments, Site, choose, kernels, scaled_mm

E4M3 = formats["e4m3"]
REFUSED = [
    (Site("linear", "cpu", 16, 32, "e4m3", "e4m3"), "it is a linear kernel for CUDA"),
    (Site("conv2d", "cuda", 16, 32, "e4m3", "e4m3"), "it is a linear kernel for CUDA"),
    (Site("linear", "cuda", 16, 32, "int8", "e4m3"), "it multiplies e4m3 only"),
    (Site("linear", "cuda", 16, 32, "e4m3", "float"), "it multiplies e4m3 only"),
]


def build(static: bool, bias: bool, dtype: torch.dtype) -> tuple[Tensor, Arguments]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 64, generator=generator).to(dtype)
    return x, Arguments(
        weight=E4M3.encode(torch.randn(48, 64, generator=generator) * 100),
        scale=torch.rand(48, generator=generator) / 100,
        bias=torch.randn(48, generator=generator).to(dtype) if bias else None,
        input_affine=torch.tensor([[0.005, 0.0]]) if static else None,
        weight_bits=8,
        columns=64,
        multiplier_bits=0,
        groups=0,
        input_bits=8,
        segments=[],
    )


def reference(x: Tensor, a: Arguments) -> Tensor:
    """Restored inputs times restored weights, in float64."""
    if a.input_affine is None:
        step = x.abs().amax(-1, keepdim=True).float() / E4M3.high
    else:
        step = a.input_affine[0, 0]
    restored = E4M3.round(x.float() / step).double() * step
    y = restored @ (E4M3.decode(a.weight) * a.scale[:, None]).double().t()
    return y if a.bias is None else y + a.bias.double()


def agrees(y: Tensor, x: Tensor, a: Arguments) -> bool:
    expected = reference(x, a)
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    # The product is rounded to bfloat16 before the bias.
    return bool((y.double() - expected).norm() <= 2**-8 * expected.norm())


each = pytest.mark.parametrize("static", [True, False])
biased = pytest.mark.parametrize("bias", [True, False])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@each
@biased
@dtypes
def test_the_product_is_that_of_restored_values(static: bool, bias: bool, dtype) -> None:
    x, a = build(static, bias, dtype)
    assert agrees(scaled_mm.linear(x, a), x, a)


@pytest.mark.gpu
@each
@biased
@dtypes
def test_the_product_on_cuda_is_that_of_restored_values(static: bool, bias: bool, dtype) -> None:
    x, a = build(static, bias, dtype)
    moved = Arguments(*(v.cuda() if isinstance(v, Tensor) else v for v in a))
    assert agrees(scaled_mm.linear(x.cuda(), moved).cpu(), x, a)


@pytest.mark.parametrize(("site", "text"), REFUSED)
def test_what_it_refuses_and_why(site: Site, text: str) -> None:
    assert kernels["scaled_mm"].refuses(site) == text


def test_it_is_never_chosen_on_a_cpu() -> None:
    assert choose(REFUSED[0][0]) is None


@pytest.mark.gpu
def test_sizes_that_the_op_does_not_take_are_refused() -> None:
    site = Site("linear", "cuda", 24, 32, "e4m3", "e4m3")
    assert kernels["scaled_mm"].refuses(site) == "it takes multiples of 16 only, not 32 -> 24"
