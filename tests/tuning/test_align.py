"""Layers that learn alone, one after the other."""

import torch
from torch import nn

from dq.nn import QuantLayer
from dq.nn.latent import FullWeight
from dq.nn.simulated import simulate
from dq.plan import LayerSpec
from dq.presets import weight_preset
from dq.tuning.align import align
from dq.tuning.loop import Group, Schedule


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.second, self.first = nn.Linear(32, 8), nn.Linear(16, 32)  # not in the order of running

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        return (self.second(nn.functional.silu(self.first(sample))),)


def test_each_learns_behind_the_one_before() -> None:
    torch.manual_seed(0)
    model = Chain()
    x = torch.randn(12, 16)
    wanted = model(x)[0].detach()
    spec = LayerSpec(weight_preset("int3-g0"))
    for name in ("first", "second"):
        setattr(model, name, simulate(getattr(model, name), spec))
    before = (model(x)[0] - wanted).square().mean()
    order = []

    def learn(name: str) -> list[Group]:
        order.append(name)
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantLayer)
        layer.latent = FullWeight(layer.matrix())
        layer.latent_bias = nn.Parameter(layer.bias.detach().clone())
        return [Group([*layer.latent.parameters(), layer.latent_bias], 0.01)]

    align(model, ("second", "first"), learn, {"sample": x}, Schedule(100))
    assert order == ["first", "second"]
    assert (model(x)[0] - wanted).square().mean() < 0.3 * before
