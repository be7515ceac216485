"""Every way computes the same: ragged sizes, all dtypes, batches, text, blocks of any form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dq.errors import DQError
from dq.kernels.block_sparse import FLOAT, block_sparse_attention, path, ways
from dq.kernels.live_blocks import LiveBlocks
from dq.tokens import TokenLayout
from tests.kernels.block_sparse.cases import operands, sparse

# Flex compiles each shape for seconds: it has tests of its own.
NAMES = [n for n, way in ways.items() if "cpu" in way.devices and n not in ("flex", "dense")]
each = pytest.mark.parametrize("name", NAMES)
LAYOUTS = [
    TokenLayout((8, 8)),
    TokenLayout((7, 9), 5),
    TokenLayout((3, 4, 5), 11, text_first=True),
    TokenLayout((16, 16), 77),
]
BLOCKS = [(16, 16), (32, 32), (64, 64), (8, 32), (64, 32)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def expected(q: Tensor, k: Tensor, v: Tensor, scale: float, blocks: LiveBlocks) -> Tensor:
    """Return it in float64, by the definition: a token sees those of live blocks."""
    heads, tokens = q.shape[1], q.shape[2]
    out = torch.empty(q.shape, dtype=torch.float64)
    for head in range(heads):
        place = torch.empty(tokens, dtype=torch.long)
        there = blocks.table[head] >= 0
        place[blocks.table[head][there].long()] = there.nonzero().squeeze(1)
        rows, columns = (place // size for size in blocks.block)
        seen = blocks.live[head][rows][:, columns]
        scores = q[:, head].double() @ k[:, head].double().mT * scale
        out[:, head] = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[:, head].double()
    return out


@each
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_way_computes_the_definition(
    name: str, layout: TokenLayout, block: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    q, k, v = operands(layout.tokens, 3, 40, dtype)
    blocks = sparse(layout, 3, block)
    if not ways[name].serves(q, k, v, blocks, FLOAT):
        pytest.skip(f"{name} does not take these")
    made = block_sparse_attention(q, k, v, 0.3, blocks, asked=name)
    assert made.dtype == dtype
    wanted = expected(q, k, v, 0.3, blocks)
    torch.testing.assert_close(made.double(), wanted, rtol=0, atol=TOLERANCE[dtype])


@each
@pytest.mark.parametrize("depth", [32, 40, 48, 64, 72, 80, 128, 160, 17])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_depth_of_heads(name: str, depth: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layout = TokenLayout((9, 7), 3)
    q, k, v = operands(layout.tokens, 2, depth, dtype)
    blocks = sparse(layout, 2, (32, 32))
    if not ways[name].serves(q, k, v, blocks, FLOAT):
        pytest.skip(f"{name} does not take these")
    made = block_sparse_attention(q, k, v, depth**-0.5, blocks, asked=name)
    wanted = expected(q, k, v, depth**-0.5, blocks)
    torch.testing.assert_close(made.double(), wanted, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", [*NAMES, "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_every_block_it_is_plain_attention(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layout = TokenLayout((9, 7), 3)
    q, k, v = operands(layout.tokens, 4, 32, dtype)
    blocks = sparse(layout, 4, (32, 32), density=1.0)
    assert blocks.density == 1
    if not ways[name].serves(q, k, v, blocks, FLOAT):
        pytest.skip(f"{name} does not take these")
    made = block_sparse_attention(q, k, v, 0.2, blocks, asked=name)
    wanted = F.scaled_dot_product_attention(q, k, v, scale=0.2)
    torch.testing.assert_close(made, wanted, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", [*NAMES, "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_no_number_stays_none(name: str, dtype: torch.dtype) -> None:
    """A broken model has to show: finite images of it would pass for real ones."""
    layout = TokenLayout((8, 8))
    q, k, v = operands(layout.tokens, 2, 32, dtype)
    q[0, 0, 5] = torch.nan
    blocks = sparse(layout, 2, (32, 32), density=1.0)
    if not ways[name].serves(q, k, v, blocks, FLOAT):
        pytest.skip(f"{name} does not take these")
    lost = block_sparse_attention(q, k, v, 0.2, blocks, asked=name).isnan().all(-1)
    assert lost[0, 0, 5]
    assert int(lost.sum()) == 1


def test_what_is_taken_is_named() -> None:
    blocks = sparse(LAYOUTS[0], 2, (16, 16))
    q = torch.randn(1, 2, 64, 16).half()
    assert path(q, q, q, blocks) == "torch's attention over gathered blocks"
    assert path(q, q, q, blocks, asked="sdpa").startswith("masked sdpa")


def test_gradients_come_through() -> None:
    blocks = sparse(LAYOUTS[1], 2, (16, 16))
    q, k, v = (x.requires_grad_() for x in operands(68, 2, 16, torch.float32))
    found = []
    for name in ("sdpa", "auto"):
        made = block_sparse_attention(q, k, v, 0.3, blocks, asked=name)
        found.append(torch.autograd.grad(made.square().sum(), (q, k, v)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_way_that_does_not_take_the_operands_says_so() -> None:
    blocks = sparse(LAYOUTS[0], 2, (16, 16))
    q = torch.randn(1, 2, 64, 16).half()
    with pytest.raises(DQError, match=r"by 'native' does not take torch\.float16 operands on cpu"):
        block_sparse_attention(q, q, q, 1.0, blocks, asked="native")
    with pytest.raises(DQError, match="Did you mean 'native'"):
        block_sparse_attention(q, q, q, 1.0, blocks, asked="nativ")
