import pytest
import torch
from torch import Tensor, nn

from dq.kernels import Arguments, reference
from dq.storage import unpack_weight
from tests.kernels.cases import CONVS, LINEARS, Case

DTYPES = {torch.float32: 1e-6, torch.bfloat16: 2**-8}


def expected(case: Case, x: Tensor, a: Arguments) -> Tensor:
    """The layer in float64, from the definition: restored inputs times restored weights.

    Steps and levels are float32, as the definition says; ties would fall elsewhere in float64.
    """
    weight = unpack_weight({"weight": a.weight, "weight_scale": a.scale}, case.spec, case.columns)
    axis = -1 if case.geometry is None else 1
    top = (1 << case.input_bits) - 1
    x = x.float()
    if a.input_affine is None:
        scale = x.abs().amax([-1] if axis == -1 else [1, 2, 3], keepdim=True) / (top // 2)
        done = [torch.round(x / scale).double() * scale]
    else:
        done = []
        parts = x.split(case.segments or [case.channels], axis)
        for part, (scale, zero) in zip(parts, a.input_affine, strict=True):
            codes = (torch.round(part / scale) + zero).clamp(0, top)
            done.append((codes - zero).double() * scale)
    x = torch.cat(done, axis)
    bias = None if a.bias is None else a.bias.double()
    if case.geometry is None:
        return nn.functional.linear(x, weight.double(), bias)
    g = case.geometry
    weight = weight.double().view(case.rows, -1, *g.kernel_size)
    return nn.functional.conv2d(x, weight, bias, *g[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*LINEARS, *CONVS], ids=str)
def test_the_reference_is_the_product_of_restored_values(case: Case, dtype: torch.dtype) -> None:
    x, a = case.build(dtype)
    run = reference.linear if case.geometry is None else reference.conv2d
    y = run(x, a) if case.geometry is None else run(x, a, case.geometry)
    assert y.dtype == dtype
    wanted = expected(case, x, a)
    assert y.shape == wanted.shape
    # The largest terms that cancel set the rounding of the sum.
    assert ((y.double() - wanted).abs() <= DTYPES[dtype] * (wanted.abs().amax() + 1)).all()
