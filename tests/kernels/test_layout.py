"""Layouts are read off what oneDNN makes of numbers, and believed only if they reproduce it."""

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from dq.kernels import onednn
from dq.kernels.integer import integer_weight
from dq.kernels.layout import Layout, _learn, _memory, layout_of, scratch_bytes
from dq.kernels.native import library, why_not
from tests.kernels.cases import CONVS, LINEARS, Case

pytestmark = pytest.mark.skipif(library() is None, reason=f"no native kernels: {why_not()}")


def linear(weight: Tensor) -> Tensor:
    return torch.ops.onednn.qlinear_prepack(weight, [32, weight.shape[1]])


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 8), (16, 1), (48, 64), (70, 33), (256, 129)], ids=str
)
def test_linear_layouts_are_found(shape: tuple[int, int]) -> None:
    found = _learn(shape, linear)
    assert isinstance(found, Layout)
    assert found.row_offsets.shape == shape[:1]
    assert found.column_offsets.shape == shape[1:]


def test_other_orders_are_refused() -> None:
    order = torch.randperm(24 * 8, generator=torch.Generator().manual_seed(0))

    def shuffled(weight: Tensor) -> Tensor:
        return linear(weight.flatten()[order].view_as(weight))

    assert _learn((24, 8), shuffled) is None


def test_lossy_layouts_are_refused() -> None:
    assert _learn((24, 8), lambda weight: linear(weight // 2)) is None


@pytest.mark.parametrize(
    "case", [c for c in (*LINEARS, *CONVS) if not c.segments and c.bits < 8], ids=str
)
def test_expanded_weights_are_byte_for_byte_those_that_are_packed(case: Case) -> None:
    x, a = case.build()
    fresh = a._replace(keep=False)
    run = onednn.product if case.geometry is None else onednn.conv2d
    rows = x.reshape(-1, x.shape[-1]) if case.geometry is None else x
    geometry = () if case.geometry is None else (case.geometry,)
    run(rows, a, *geometry)
    (kept,) = next(iter(onednn._prepared[a.weight].packed.values()))
    assert onednn.resident_bytes(a.weight) > 0
    onednn.forget(a.weight)
    run(rows, fresh, *geometry)
    (layout,) = next(iter(onednn._prepared[a.weight].packed.values()))
    if case.geometry is None or case.geometry.groups == 1:
        assert isinstance(layout, Layout)
        assert onednn.resident_bytes(a.weight) == 0
        assert torch.equal(_memory(layout.expand(fresh, 0)), _memory(kept))
        assert int(integer_weight(a).abs().max()) > 0


def test_layers_of_a_shape_share_their_scratch_until_the_last_is_gone() -> None:
    gc.collect()
    before = scratch_bytes()
    one, two = (layout_of("test", (48, 64), linear) for _ in range(2))
    assert one is two
    assert scratch_bytes() >= before + 48 * 64
    del one, two
    gc.collect()
    assert scratch_bytes() == before


def test_threads_do_not_write_into_each_others_scratch() -> None:
    cases = [Case((200, 64), 48, bits=4, group=32).build(torch.bfloat16) for _ in range(2)]
    layers = [
        (x, a._replace(weight=a.weight.roll(i, 0), keep=False)) for i, (x, a) in enumerate(cases)
    ]
    expected = [onednn.product(x, a) for x, a in layers]
    assert not torch.equal(*expected)

    def work(index: int) -> bool:
        x, a = layers[index]
        return all(torch.equal(onednn.product(x, a), expected[index]) for _ in range(200))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, range(2)))
