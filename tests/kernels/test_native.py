"""Native functions compute what their torch definitions say."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from dq.kernels import reference
from dq.kernels.inputs import affine_of
from dq.kernels.integer import integer_weight
from dq.kernels.native import calls, library, why_not
from tests.kernels.cases import CONVS, LINEARS, Case

pytestmark = pytest.mark.skipif(library() is None, reason=f"no native kernels: {why_not()}")

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
extents = st.integers(1, 70)


def numbers(*shape: int, dtype: torch.dtype = torch.float32, size: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * size).to(dtype)


def codes(x: torch.Tensor, inverse: torch.Tensor, zero: int, top: int) -> torch.Tensor:
    return (torch.round(x.float() * inverse) + zero).clamp(0, top).to(torch.uint8)


@dtypes
@given(
    rows=extents,
    columns=extents,
    scale=st.floats(2**-20, 2**20, width=32),
    bits=st.integers(2, 8),
    data=st.data(),
)
def test_rows(dtype: torch.dtype, rows: int, columns: int, scale: float, bits: int, data) -> None:
    top = (1 << bits) - 1
    zero = data.draw(st.integers(0, top))
    inverse = torch.tensor(scale).reciprocal()
    x = numbers(rows, columns + 3, dtype=dtype, size=scale * 100)[:, 1 : columns + 1]
    made = calls.quantize_rows(x, float(inverse), zero, top)
    assert torch.equal(made, codes(x, inverse, zero, top))


@dtypes
def test_ties_round_to_even_and_outliers_saturate(dtype: torch.dtype) -> None:
    x = torch.tensor([[-1e30, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 1e30]], dtype=dtype)
    assert calls.quantize_rows(x, 1.0, 10, 255).tolist() == [[0, 8, 8, 10, 10, 12, 12, 255]]


@dtypes
@given(
    batch=st.integers(1, 3), channels=st.integers(1, 140), height=extents, width=st.integers(1, 9)
)
def test_planes(dtype: torch.dtype, batch: int, channels: int, height: int, width: int) -> None:
    x = numbers(batch, channels, height, width, dtype=dtype)
    inverse = torch.tensor(0.03).reciprocal()
    made = calls.quantize_planes(x, float(inverse), 77, 255)
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(made, codes(x, inverse, 77, 255))


@dtypes
@given(rows=extents, columns=extents, bits=st.integers(2, 8))
def test_tokens(dtype: torch.dtype, rows: int, columns: int, bits: int) -> None:
    x = numbers(rows, columns, dtype=dtype)
    x[0] = 0  # nothing to scale
    top, half = (1 << bits) - 1, 1 << (bits - 1)
    made, scales = calls.quantize_tokens(x, top)
    reach = x.abs().amax(1, keepdim=True).float()
    expected = (reach / (half - 1)).clamp_min(torch.finfo(torch.float32).tiny)
    assert torch.equal(scales, expected)
    assert torch.equal(made, codes(x, scales.reciprocal(), half, top))


@dtypes
def test_rescale(dtype: torch.dtype) -> None:
    x, scales, bias = numbers(37, 50), numbers(37, 1), numbers(50)
    made = calls.rescale(x, scales, bias, dtype)
    expected = (x.double() * scales + bias).to(dtype)
    assert torch.allclose(
        made.float(), expected.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6
    )


@pytest.mark.parametrize("case", [*LINEARS, *CONVS], ids=str)
def test_expand_puts_each_weight_where_the_offsets_say(case: Case) -> None:
    _, a = case.build()
    a = a._replace(weight=a.weight.flatten(1))
    whole = integer_weight(a)
    rows, columns = whole.shape
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(0)).int()
    starts = (torch.arange(rows) * columns).int()
    out = torch.zeros(rows * columns, dtype=torch.int8)
    sums = torch.zeros(rows, dtype=torch.int32)
    calls.expand(a, 0, starts, order, out.data_ptr(), sums.data_ptr())
    assert torch.equal(out.view(rows, columns)[:, order.long()], whole)
    assert torch.equal(sums, -whole.sum(1, dtype=torch.int32))
    half = columns // 2
    if half:  # only the columns from the middle on
        out.zero_()
        calls.expand(a, half, starts, order[half:].contiguous(), out.data_ptr(), 0)
        assert torch.equal(out.view(rows, columns)[:, order[half:].long()], whole[:, half:])
        assert not out.view(rows, columns)[:, order[:half].long()].any()


@dtypes
@pytest.mark.parametrize("case", [c for c in LINEARS if not c.segments], ids=str)
def test_a_whole_layer_of_few_rows(case: Case, dtype: torch.dtype) -> None:
    x, a = case.build(dtype)
    rows = x.reshape(-1, x.shape[-1])
    affine = affine_of(a)
    bias = torch.zeros(len(a.weight)) if a.bias is None else a.bias.float()
    made = calls.linear_rows(rows, a, affine[0] if affine else None, bias)
    expected = reference.linear(rows, a)
    size = float(expected.abs().max()) + 1
    assert made.dtype == dtype
    assert torch.allclose(
        made.float(), expected.float(), rtol=2.1 * torch.finfo(dtype).eps, atol=4e-7 * size
    )


@dtypes
@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (2, 12, 7, 5), (3, 64, 33, 2)], ids=str)
def test_group_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (numbers(*shape, dtype=dtype) + 20).contiguous(memory_format=torch.channels_last)
    weight, bias = numbers(shape[1]), numbers(shape[1])
    made = calls.group_norm(x, 4, weight, bias, 1e-5)
    expected = F.group_norm(x.double(), 4, weight.double(), bias.double(), 1e-5)
    assert made.is_contiguous(memory_format=torch.channels_last)
    limit = {torch.float32: 2e-5, torch.bfloat16: 0.02}[dtype]
    assert torch.allclose(made.double(), expected, rtol=limit, atol=limit)


@pytest.mark.skipif(not calls.has_attention(), reason="it needs AVX512-BF16")
@pytest.mark.parametrize("depth", [1, 8, 16, 23, 40, 64, 80, 128])
@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 1), (7, 3), (8, 32), (37, 33), (64, 77), (130, 257)]
)
def test_attention(queries: int, keys: int, depth: int) -> None:
    q, k, v = (
        numbers(2, n, 3 * depth, dtype=torch.bfloat16, size=1).view(2, n, 3, depth).transpose(1, 2)
        for n in (queries, keys, keys)
    )
    made = calls.attention(q, k, v, depth**-0.5)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    theirs = F.scaled_dot_product_attention(q, k, v).double()
    error, usual = (float((y.double() - exact).norm() / exact.norm()) for y in (made, theirs))
    assert error <= max(1.1 * usual, 3e-3)


@pytest.mark.skipif(not calls.has_attention(), reason="it needs AVX512-BF16")
def test_attention_of_far_apart_scores_is_finite() -> None:
    q = torch.full((1, 1, 4, 16), 60.0, dtype=torch.bfloat16)
    k = torch.cat([q, -q, q * 0], dim=2)
    v = torch.arange(12 * 16, dtype=torch.bfloat16).view(1, 1, 12, 16)
    made = calls.attention(q, k, v, 1.0)
    assert torch.allclose(made.float(), v[:, :, :4].float().mean(2, keepdim=True), rtol=8e-3)


def test_a_profiler_sees_native_functions() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        calls.quantize_rows(numbers(4, 4), 1.0, 0, 255)
    assert "native::quantize_rows" in {event.key for event in seen.key_averages()}
