import pytest
import torch
from torch import nn

from dq.taps import hooked, tap_inputs, tap_outputs


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def test_taps_see_what_enters_and_leaves(model: nn.Sequential) -> None:
    into, out = {}, {}
    layers = {"first": model[0], "last": model[2]}
    x = torch.randn(5, 4)
    with tap_inputs(layers, into.__setitem__), tap_outputs(layers, out.__setitem__):
        y = model(x)
    assert torch.equal(into["first"], x)
    assert torch.equal(into["last"], out["first"].relu())
    assert torch.equal(out["last"], y)
    assert not into["last"].requires_grad  # inputs are looked at
    assert out["last"].requires_grad  # outputs are learned from


@pytest.mark.parametrize("tap", [tap_inputs, tap_outputs])
def test_they_are_removed_also_after_an_error(model: nn.Sequential, tap) -> None:
    with pytest.raises(KeyError), tap({"first": model[0]}, lambda name, x: None):
        raise KeyError
    assert not model[0]._forward_pre_hooks
    assert not model[0]._forward_hooks


def test_all_hooks_go_if_removing_one_fails(model: nn.Sequential) -> None:
    class Stubborn:
        def remove(self) -> None:
            raise RuntimeError("stays")

    handle = model[0].register_forward_hook(lambda *args: None)
    with pytest.raises(RuntimeError, match="stays"), hooked([handle, Stubborn()]):
        assert model[0]._forward_hooks
    assert not model[0]._forward_hooks
