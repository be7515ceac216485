"""All ways to compute attention agree, and the choice between them repeats."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dq.kernels import attention as module
from dq.kernels.attention import WAYS, attention, available, serves
from dq.kernels.measured import fastest


def inputs(queries: int = 40, keys: int = 24, depth: int = 16) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(2, n, 3 * depth, generator=generator)
        .bfloat16()
        .view(2, n, 3, depth)
        .transpose(1, 2)
        for n in (queries, keys, keys)
    )


def error(y: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> float:
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=scale)
    return float((y.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("scale", [0.25, 1.0])
@pytest.mark.parametrize("shape", [(40, 24, 16), (300, 77, 40), (64, 64, 64)], ids=str)
@pytest.mark.parametrize("name", WAYS)
def test_every_way_is_as_exact_as_bfloat16_allows(
    name: str, shape: tuple[int, int, int], scale: float
) -> None:
    if name not in available():
        pytest.skip("this machine has it not")
    q, k, v = inputs(*shape)
    y = WAYS[name](q, k, v, scale)
    assert y.shape == q.shape
    assert y.dtype == torch.bfloat16
    limit = 0.012 if name.startswith("tiles") and scale == 1 else 6e-3  # see the module
    assert error(y, q, k, v, scale) < limit


def test_the_table_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def choose(kind: str, shape: tuple[int, ...], among: tuple[str, ...]) -> str:
        asked.append((kind, shape, among))
        return "sdpa"

    monkeypatch.setattr(module, "fastest", choose)
    q, k, v = inputs()
    assert torch.equal(attention(q, k, v, 0.25), F.scaled_dot_product_attention(q, k, v))
    assert asked == [("attention", (40, 24, 16), tuple(available()))]


def test_without_the_native_kernel_another_is_taken() -> None:
    others = tuple(name for name in WAYS if name != "native")
    for shape in ((64, 64, 48), (1024, 1024, 40), (1024, 77, 16)):
        assert fastest("attention", shape, others) in others


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q.float(), k.float(), v.float(), 1.0),
        lambda q, k, v: (q[0], k[0], v[0], 1.0),
        lambda q, k, v: (q.mT.contiguous().mT, k, v, 1.0),
        lambda q, k, v: (q[:, :1], k, v, 1.0),
        lambda q, k, v: (q, k, v, -1.0),
        lambda q, k, v: (q[:, :, :0], k, v, 1.0),
        lambda q, k, v: (q.detach().requires_grad_(), k, v, 1.0),
    ],
)
def test_what_it_does_not_serve(change) -> None:
    assert serves(*inputs(), 1.0)
    assert not serves(*change(*inputs()))


def test_the_graph_sees_one_op_with_the_true_shape() -> None:
    q, k, v = inputs()
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.dq.attention.default, (q, k, v, 0.25), test_utils=checks)
