import pytest
import torch
from torch import Tensor

from dq.errors import DQError
from dq.nn import Quantizer
from dq.quantize import choose_scales, fake_quantize
from dq.spec import Granularity, TensorSpec
from tests.specs import INPUTS, WEIGHTS

STATIC = [spec for spec in INPUTS if not spec.dynamic]
DYNAMIC = [spec for spec in INPUTS if spec.dynamic]


@pytest.mark.parametrize("spec", WEIGHTS, ids=str)
def test_a_fitted_quantizer_rounds_with_the_chosen_scales(spec: TensorSpec) -> None:
    x = torch.randn(5, 24)
    quantizer = Quantizer(spec)
    quantizer.fit(x)
    assert torch.equal(quantizer(x), fake_quantize(x, choose_scales(x, spec), spec))


@pytest.mark.parametrize("spec", STATIC, ids=str)
def test_a_static_quantizer_keeps_its_range(spec: TensorSpec) -> None:
    quantizer = Quantizer(spec)
    quantizer.set_range(torch.tensor(-1.0), torch.tensor(2.0))
    y = quantizer(torch.randn(4, 16) * 100)
    step = float(quantizer.scales.scale)
    assert y.max() <= 2.0 + step * 0.51
    assert y.max() == quantizer(y).max()
    if spec.symmetric and spec.grid.low < 0:
        assert -2.0 - step * 1.01 <= y.min()
    else:
        assert -1.0 - step * 0.51 <= y.min()


@pytest.mark.parametrize("spec", DYNAMIC, ids=str)
def test_a_dynamic_quantizer_treats_each_row_alone(spec: TensorSpec) -> None:
    quantizer = Quantizer(spec)
    x = torch.randn(4, 16) * torch.tensor([[1.0], [1e3], [1e-3], [0.0]])
    rows = torch.cat([quantizer(row[None]) for row in x])
    assert torch.equal(quantizer(x), rows)
    assert quantizer.scale is None


@pytest.mark.parametrize("spec", STATIC, ids=str)
def test_a_static_quantizer_without_a_range_asks_for_calibration(spec: TensorSpec) -> None:
    with pytest.raises(DQError, match="no scales yet: static inputs need a calibration first"):
        Quantizer(spec)(torch.randn(2, 8))


def test_fitting_draws_no_gradient_and_the_scales_travel_with_the_module() -> None:
    spec = TensorSpec("uint4", Granularity("group", 8), symmetric=False)
    quantizer = Quantizer(spec)
    quantizer.fit(torch.randn(2, 16, requires_grad=True))
    assert not quantizer.scales.scale.requires_grad
    assert set(quantizer.state_dict()) == {"scale", "zero"}
    moved = quantizer.to("meta").scales
    assert all(t.is_meta for t in moved if isinstance(t, Tensor))


def test_no_gradient_flows_through_a_dynamic_scale() -> None:
    spec = TensorSpec("int8", Granularity("token"), dynamic=True)
    x = torch.randn(2, 8, requires_grad=True)
    Quantizer(spec)(x).sum().backward()
    assert torch.allclose(x.grad, torch.ones(2, 8), atol=1e-6)
