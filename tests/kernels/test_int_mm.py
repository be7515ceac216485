import pytest
import torch

from dq.kernels import Site, int_mm, kernels, reference
from tests.kernels.cases import LINEARS, Case

SITE = Site("linear", "cpu", 16, 32, "int8", "int8")


@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
def test_chunks_of_rows_join_seamlessly(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, a = Case((33, 72), 37, inputs=(9,)).build()
    expected = int_mm.linear(x, a)
    monkeypatch.setattr(int_mm, "_CHUNK", chunk)
    assert torch.equal(int_mm.linear(x, a), expected)


@pytest.mark.parametrize("rows", range(1, 20))
def test_any_number_of_rows(rows: int) -> None:
    x, a = Case((rows, 24), 8).build()
    assert torch.allclose(int_mm.linear(x, a), reference.linear(x, a), rtol=1e-6, atol=1e-5)


def test_long_sums_are_exact() -> None:
    # 8192 products of 255 x 127 pass the 24 bits of float32, not the 31 of int32.
    x, a = Case((2, 8192), 8, inputs=(0,), bias=False).build()
    x, weight = torch.full_like(x, 1e9), torch.full_like(a.weight, 255)
    a = a._replace(weight=weight, scale=torch.ones(8), input_affine=torch.tensor([[1.0, 0.0]]))
    exact = 8192 * 255 * 127
    assert int_mm.linear(x, a)[0, 0] == torch.tensor(exact).float()


@pytest.mark.parametrize(
    ("site", "text"),
    [
        (Site("conv2d", "cpu", 16, 32, "int8", "int8"), "linear kernel"),
        (Site("linear", "mps", 16, 32, "int8", "int8"), "for CPUs and CUDA"),
        (Site("linear", "cpu", 16, 32, "int8", "float"), "integers only"),
        (Site("linear", "cpu", 16, 32, "other", "int8"), "integers only"),
        (Site("linear", "cuda", 12, 32, "int8", "int8"), "multiples of 8 only, not 32 -> 12"),
        (Site("linear", "cuda", 16, 36, "int8", "int8"), "multiples of 8 only, not 36 -> 16"),
    ],
)
def test_what_it_refuses_and_why(site: Site, text: str) -> None:
    assert text in (kernels["int_mm"].refuses(site) or "")


def test_odd_sizes_are_served_on_the_cpu() -> None:
    assert kernels["int_mm"].refuses(Site("linear", "cpu", 3, 5, "int8", "int8")) is None


@pytest.mark.gpu
@pytest.mark.parametrize("case", LINEARS, ids=str)
def test_cuda_equals_the_reference(case: Case) -> None:
    site = Site("linear", "cuda", case.rows, case.columns, "int8", "int8")
    if kernels["int_mm"].refuses(site):
        pytest.skip("not served")
    x, a = case.build()
    moved = [v.cuda() if isinstance(v, torch.Tensor) else v for v in a]
    y = int_mm.linear(x.cuda(), type(a)(*moved)).cpu()
    assert torch.allclose(y, reference.linear(x, a), rtol=1e-5, atol=1e-5)
