"""The native CPU kernels, bfloat16 and float32: order and mask cost next to nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from dq.kernels.block_sparse.way import FLOAT, Operands, Way, ways
from dq.kernels.live_blocks import LiveBlocks
from dq.kernels.native import calls

__all__ = ["NATIVE"]


def _serves(q: Tensor, k: Tensor, v: Tensor, blocks: LiveBlocks, operands: Operands) -> bool:
    queries, keys = blocks.block
    return (
        operands == FLOAT
        and all(x.dtype == q.dtype and x.stride(-1) == 1 for x in (q, k, v))
        and queries % 8 == 0
        and keys % 16 == 0
        and calls.has_attention(q.dtype)
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)))
    )


def _run(
    q: Tensor, k: Tensor, v: Tensor, scale: float, blocks: LiveBlocks, operands: Operands
) -> Tensor:
    return calls.attention(q, k, v, scale, blocks)


NATIVE = ways.add("native", Way("native kernel, blocks skipped", ("cpu",), _serves, _run, rank=0))
