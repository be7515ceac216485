"""Theoretical operations: against published numbers, and by hand."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from dq.engine import quantize
from dq.family import Role, family_of, quantizable
from dq.methods.ptq import PTQ
from dq.nn import matrix_shape
from dq.pipelines.operations import Operations, operations
from dq.recipe import Recipe
from tests.models import MODELS


def test_the_count_of_ldm_4_bedrooms_is_the_published_one() -> None:
    down = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    with torch.device("meta"):
        model = UNet2DModel(
            sample_size=64, in_channels=3, out_channels=3, layers_per_block=2,
            block_out_channels=(224, 448, 672, 896), down_block_types=down,
            up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
            attention_head_dim=32,
        )  # fmt: skip
        call = {"sample": torch.zeros(1, 3, 64, 64), "timestep": torch.zeros(1)}
    assert sum(p.numel() for p in model.parameters()) == 274_056_163
    found = operations(model, call)
    assert round(found.macs / 1e9, 2) == 96.02
    assert (found.float_macs, found.bit_operations) == (found.macs, 0)


def test_linears_and_convolutions_by_hand() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)
            self.linear = nn.Linear(6, 5)

        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            return self.linear(self.conv(sample).flatten(2).mT)

    found = operations(Net(), {"sample": torch.zeros(2, 4, 7, 3)})
    assert found.macs == 2 * 7 * 3 * (6 * (4 // 2) * 9 + 6 * 5)


@pytest.mark.parametrize("name", ["sd32", "dit64", "flux"])
def test_bits_multiply(name: str) -> None:
    model = MODELS[name].network(MODELS[name].build())
    call = family_of(model).sample_inputs(model, 1, torch.Generator().manual_seed(0))
    whole = operations(model, call).macs
    roles = family_of(model).roles(model)
    shapes = {n: matrix_shape(layer) for n, layer in quantizable(model).items()}
    skipped = tuple({roles[n] for n in shapes} & {Role.TIME, Role.IO})
    step = PTQ("int4-g0", "int8", "dynamic", wide_roles=(), skip_roles=skipped)
    quantize(model, Recipe("t", (step,)), None)
    found = operations(model, call)
    assert found.macs == whole
    assert found.bit_operations == (whole - found.float_macs) * 32
    assert 0 < found.float_macs < whole
    assert found.operations == found.bit_operations / 64 + found.float_macs


def test_it_says_that_it_is_no_time() -> None:
    words = str(Operations(10**9, 10**8, 36 * 10**8))
    assert words.startswith("theoretical 1.000 G multiply-adds")
    assert "No time follows" in words
