import pytest
import torch

from dq.quantize import choose_scales, fake_quantize, quantize
from dq.spec import TensorSpec
from dq.storage import pack_weight, stored_shapes, unpack_weight
from tests.specs import WEIGHTS

SHAPES = [(5, 24), (1, 8), (7, 72), (16, 64)]


def stored(weight: torch.Tensor, spec: TensorSpec) -> dict[str, torch.Tensor]:
    scales = choose_scales(weight, spec)
    return pack_weight(quantize(weight, scales, spec), scales, spec)


each = pytest.mark.parametrize("spec", WEIGHTS, ids=str)


@each
def test_what_is_stored_is_what_was_simulated(spec: TensorSpec) -> None:
    for shape in SHAPES:
        weight = torch.randn(shape)
        restored = unpack_weight(stored(weight, spec), spec, shape[1])
        assert restored.dtype == torch.float32
        expected = fake_quantize(weight, choose_scales(weight, spec), spec)
        assert torch.equal(restored, expected)


@each
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_stored_tensors_have_the_promised_shapes(spec: TensorSpec, device: str) -> None:
    for shape in SHAPES:
        weight = torch.randn(shape).to(device)
        state = stored(weight, spec)
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
        assert found == stored_shapes(spec, *shape)
        assert {tensor.device.type for tensor in state.values()} == {device}


@each
def test_low_precision_weights_are_packed_like_their_float32_values(spec: TensorSpec) -> None:
    weight = torch.randn(5, 24).bfloat16()
    low = stored(weight, spec)
    full = stored(weight.float(), spec)
    assert all(torch.equal(low[name], full[name]) for name in full)
    assert low["weight_scale"].dtype == torch.float32
