"""torch's own attention with the blocks written out as a mask: what defines all other ways.

It saves no time, and takes a mask of all queries and keys.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from dq.kernels.block_sparse.way import FLOAT, Operands, Way, ways
from dq.kernels.live_blocks import LiveBlocks

__all__ = ["REFERENCE"]


def _run(
    q: Tensor, k: Tensor, v: Tensor, scale: float, blocks: LiveBlocks, operands: Operands
) -> Tensor:
    q, k, v = (blocks.moved(x) for x in (q, k, v))
    return blocks.restored(F.scaled_dot_product_attention(q, k, v, blocks.mask, scale=scale))


REFERENCE = ways.add(
    "sdpa",
    Way(
        "masked sdpa: nothing is skipped",
        ("cpu", "cuda", "mps", "xpu"),
        lambda q, k, v, blocks, operands: operands == FLOAT,
        _run,
        rank=9,
    ),
)
