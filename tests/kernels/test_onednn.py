import gc

import pytest
import torch

from dq.kernels import onednn, reference
from tests.kernels.cases import CONVS, GEOMETRIES, LINEARS, Case

LINEAR = Case((6, 24), 9, bits=4, group=8, inputs=(100,))
SPLIT = Case((3, 5, 24), 9, inputs=(0, 200), segments=(16, 8))
CONV = Case((2, 8, 7, 5), 16, inputs=(77,), geometry=CONVS[0].geometry)
each = pytest.mark.parametrize("case", [LINEAR, SPLIT, CONV], ids=["linear", "split", "conv"])


def run(case: Case, x, a):
    if case.geometry is None:  # such small ones would run natively
        rows = x.reshape(-1, x.shape[-1])
        y = onednn.product(rows, a).view(*x.shape[:-1], -1)
        return y, reference.linear(x, a)
    return onednn.conv2d(x, a, case.geometry), reference.conv2d(x, a, case.geometry)


def close(pair) -> bool:
    return torch.allclose(*pair, rtol=1e-5, atol=1e-5)


@each
def test_weights_that_change_in_place_are_packed_anew(case: Case) -> None:
    x, a = case.build()
    before, _ = run(case, x, a)
    a.weight.copy_(a.weight.flip(0))
    after, expected = run(case, x, a)
    assert not torch.allclose(before, after, rtol=1e-2)
    assert close((after, expected))


@each
def test_scales_that_change_in_place_count(case: Case) -> None:
    x, a = case.build()
    run(case, x, a)
    a.scale.mul_(torch.rand(len(a.scale)) + 1.5)
    a.input_affine[:, 0].mul_(1.5)
    a.input_affine[:, 1].add_(3)
    assert close(run(case, x, a))


@each
def test_replaced_scales_count(case: Case) -> None:
    x, a = case.build()
    run(case, x, a)
    a = a._replace(scale=a.scale * 3, input_affine=a.input_affine * torch.tensor([2.0, 1.0]))
    assert close(run(case, x, a))


@each
def test_weights_of_inference_mode_work(case: Case) -> None:
    with torch.inference_mode():
        x, a = case.build()
        assert close(run(case, x, a))


def test_packed_copies_are_few_and_die_with_the_weight() -> None:
    x, a = LINEAR.build()
    assert onednn.resident_bytes(a.weight) == 0
    for rows in range(1, 7):
        run(LINEAR, x[:rows], a)
        least = min(rows, 2) * LINEAR.rows * LINEAR.columns  # oneDNN pads
        assert onednn.resident_bytes(a.weight) >= least
    gc.collect()
    known = len(onednn._prepared)
    del a
    gc.collect()
    assert len(onednn._prepared) == known - 1


@pytest.mark.parametrize("layout", ["transposed", "strided", "channels_last"])
def test_inputs_may_lie_anyhow_in_memory(layout: str) -> None:
    if layout == "channels_last":
        x, a = CONV.build()
        assert close(run(CONV, x.contiguous(memory_format=torch.channels_last), a))
        return
    x, a = LINEAR.build()
    other = x.t().contiguous().t() if layout == "transposed" else x.repeat(2, 1)[::2]
    assert not other.is_contiguous()
    assert close(run(LINEAR, other, a))


@pytest.mark.parametrize("case", [*LINEARS[::8], *CONVS[: 4 * len(GEOMETRIES) : 2]], ids=str)
def test_the_graph_sees_one_product_with_the_true_shape(case: Case) -> None:
    x, a = case.build()
    rows = x.reshape(-1, x.shape[-1]) if case.geometry is None else x
    codes = onednn.quantized(rows, a, onednn.affine_of(a))
    geometry = () if case.geometry is None else case.geometry
    op = torch.ops.dq.onednn_linear if case.geometry is None else torch.ops.dq.onednn_conv2d
    checks = ("test_schema", "test_faketensor")
    arguments = (codes.parts, codes.scales, *a, *geometry, x.dtype)
    torch.library.opcheck(op.default, arguments, test_utils=checks)


@pytest.mark.parametrize("case", [*LINEARS[::5], *CONVS[::5]], ids=str)
def test_a_compiled_layer_equals_the_reference(case: Case) -> None:
    x, a = case.build(torch.bfloat16)
    torch._dynamo.reset()
    if case.geometry is None:
        compiled = torch.compile(onednn.linear, backend="aot_eager", fullgraph=True)
        y, expected = compiled(x, a), reference.linear(x, a)
    else:
        compiled = torch.compile(onednn.conv2d, backend="aot_eager", fullgraph=True)
        y, expected = compiled(x, a, case.geometry), reference.conv2d(x, a, case.geometry)
    assert torch.allclose(y.float(), expected.float(), rtol=1.6e-2, atol=1e-5)


def test_few_rows_and_many_agree_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    x, a = Case((16, 64), 32, bits=4, group=32).build(torch.bfloat16)
    few = onednn.linear(x, a)
    monkeypatch.setattr(onednn, "_few", lambda rows, a: False)
    assert torch.equal(onednn.linear(x, a), few)
