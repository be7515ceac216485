"""Where every block counts, an order changes nothing: the dense chooser takes over."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from dq.kernels.attention import attention, serves
from dq.kernels.block_sparse.way import FLOAT, Operands, Way, ways
from dq.kernels.live_blocks import LiveBlocks

__all__ = ["DENSE"]


def _run(
    q: Tensor, k: Tensor, v: Tensor, scale: float, blocks: LiveBlocks, operands: Operands
) -> Tensor:
    if serves(q, k, v, scale):
        return attention(q, k, v, scale)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


DENSE = ways.add(
    "dense",
    Way(
        "dense attention: no block is left out",
        ("cpu", "cuda", "mps", "xpu"),
        lambda q, k, v, blocks, operands: operands == FLOAT and blocks.whole,
        _run,
        rank=-1,
    ),
)
