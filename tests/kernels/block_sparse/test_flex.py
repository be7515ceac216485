"""FlexAttention takes other code when it is not compiled; neither must compute every block."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from dq.kernels.block_sparse import FLOAT, flex, ways
from dq.kernels.block_sparse.flex import block_mask
from dq.tokens import TokenLayout
from tests.kernels.block_sparse.cases import operands, sparse


def test_uncompiled_code_sees_the_same_blocks() -> None:
    torch.manual_seed(0)
    layout = TokenLayout((6, 8), 5)
    q, k, v = operands(layout.tokens, 2, 16, torch.float32)
    blocks = sparse(layout, 2, (16, 16))
    made = flex_attention(*map(blocks.moved, (q, k, v)), block_mask=block_mask(blocks), scale=0.3)
    wanted = ways["sdpa"].run(q, k, v, 0.3, blocks, FLOAT)
    torch.testing.assert_close(blocks.restored(made), wanted, rtol=0, atol=1e-5)


@torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True)
def test_after_many_shapes_it_is_compiled_still() -> None:
    torch._dynamo.reset()
    flex._compiled.cache_clear()
    for width in (4, 8, 12):
        layout = TokenLayout((4, width))
        q, k, v = operands(layout.tokens, 2, 16, torch.float32)
        blocks = sparse(layout, 2, (16, 16))
        made = ways["flex"].run(q, k, v, 0.3, blocks, FLOAT)
        wanted = ways["sdpa"].run(q, k, v, 0.3, blocks, FLOAT)
        torch.testing.assert_close(made, wanted, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("block", [(16, 16), (64, 64), (128, 128), (64, 32)], ids=str)
def test_cards_take_blocks_of_any_size(block: tuple[int, int]) -> None:
    """What a card's kernel computes at once by its own choice is more than a small block."""
    torch.manual_seed(0)
    layout = TokenLayout((19, 23), 77, text_first=True)
    q, k, v = (x.cuda() for x in operands(layout.tokens, 4, 64, torch.bfloat16))
    blocks = sparse(layout, 4, block, device="cuda")
    made = ways["flex"].run(q, k, v, 0.12, blocks, FLOAT).float()
    wanted = ways["sdpa"].run(q, k, v, 0.12, blocks, FLOAT).float()
    assert float((made - wanted).norm() / wanted.norm()) < 0.01
