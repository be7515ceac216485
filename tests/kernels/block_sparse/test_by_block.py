"""The reference of rounded operands: what a scale a block means, and what an order does to it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dq.kernels.block_sparse import FLOAT, Operands, ways
from dq.kernels.live_blocks import LiveBlocks
from dq.tokens import TokenLayout
from tests.kernels.block_sparse.cases import operands, sparse

RUN = ways["by-block"].run


def local(grid: tuple[int, ...], axis: int, sharpness: float = 6.0) -> list[Tensor]:
    """Return q, k, v of a head that sees neighbours along one axis and everything along the others.

    Random Fourier features: their products are a Gaussian of the distance (Rahimi and Recht 2007).
    """
    where = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), -1)
    frequencies = torch.randn(32, len(grid)) / (2 * min(grid))
    frequencies[:, axis] = torch.randn(32)
    angles = where.flatten(0, -2).float() @ frequencies.T
    x = torch.cat([angles.cos(), angles.sin()], -1)[None, None] / math.sqrt(32)
    return [x * sharpness, x, torch.randn_like(x)]


def error(qkv: list[Tensor], grid: tuple[int, ...], order: str, formats: Operands) -> float:
    table = TokenLayout(grid).table(order, 32)[None]
    blocks = len(table[0]) // 32
    live = LiveBlocks(table, torch.ones(1, blocks, blocks, dtype=torch.bool), (32, 32))
    exact = RUN(*qkv, 1.0, live, FLOAT)
    return float((RUN(*qkv, 1.0, live, formats) - exact).norm() / exact.norm())


@pytest.mark.parametrize(("axis", "good", "bad"), [(0, "hw", "wh"), (1, "wh", "hw")])
def test_in_order_the_probabilities_of_a_block_are_alike(axis: int, good: str, bad: str) -> None:
    """The axis that a head is local along belongs outside: then small values have small scales.

    Zhao et al. 2025 (arXiv 2506.16054); only with a scale a block: floating point
    and the operands that an order does not bring together round as well in any.
    """
    torch.manual_seed(0)
    grid = (32, 32)
    qkv = local(grid, axis)
    assert error(qkv, grid, good, Operands(None, None, "uint7")) < 0.4 * error(
        qkv, grid, bad, Operands(None, None, "uint7")
    )
    assert error(qkv, grid, good, Operands("int8", "int8", "uint7")) < 0.7 * error(
        qkv, grid, bad, Operands("int8", "int8", "uint7")
    )
    for formats in (Operands("int8"), Operands(None, "e4m3", "e4m3")):
        ratio = error(qkv, grid, good, formats) / error(qkv, grid, bad, formats)
        assert 0.7 < ratio < 1.5


def test_no_softmax_sees_what_all_keys_share() -> None:
    torch.manual_seed(0)
    layout = TokenLayout((6, 7), 5)
    q, k, v = operands(layout.tokens, 2, 24, torch.float32)
    blocks = sparse(layout, 2, (16, 16))
    shifted = k + 100 * torch.randn(1, 2, 1, 24)
    for formats in (FLOAT, Operands("int8"), Operands("int4", "int4", "uint4")):
        one, other = (RUN(q, x, v, 0.2, blocks, formats) for x in (k, shifted))
        assert (one - other).norm() < 2e-3 * one.norm()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_block_of_large_values_leaves_the_others_alone(bits: int) -> None:
    torch.manual_seed(0)
    layout = TokenLayout((4, 8))
    q, k, v = operands(layout.tokens, 1, 16, torch.float32)
    live = torch.eye(2, dtype=torch.bool)[None]  # each block of queries sees its own keys
    blocks = LiveBlocks(layout.table("hw", 16)[None], live, (16, 16))
    formats = Operands(None, f"int{bits}")
    before = RUN(q, k, v, 0.2, blocks, formats)
    v[:, :, :16] *= 1000
    assert torch.equal(RUN(q, k, v, 0.2, blocks, formats)[:, :, 16:], before[:, :, 16:])
