"""FlexAttention, compiled: a second way to leave blocks out, on cards and in float32 on CPUs.

The first call of each shape compiles, for seconds. Two traps are avoided: uncompiled, it takes no
notice of lists of blocks, and looks at the mask function alone, so that this one says the whole
truth always; and after some compilations the compiler gives up and runs uncompiled code, so that
its limit is raised.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dq.kernels.block_sparse.way import FLOAT, Operands, Way, ways
from dq.kernels.live_blocks import LiveBlocks

__all__ = ["FLEX"]

_COMPILATIONS = 256  # shapes, at most


@functools.cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def _serves(q: Tensor, k: Tensor, v: Tensor, blocks: LiveBlocks, operands: Operands) -> bool:
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return operands == FLOAT and not trained and min(blocks.block) >= 16


def block_mask(blocks: LiveBlocks) -> BlockMask:
    """Return the blocks in the form of FlexAttention: whole ones, and those that hold padding."""
    queries, keys = blocks.block
    live, there = blocks.live, blocks.there

    def mask(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return live[head, row // queries, column // keys] & there[head, column]

    padded = ~there.unflatten(1, (-1, keys)).all(-1)[:, None]
    (parts, part_numbers), (whole, whole_numbers) = (
        _lists(which) for which in (live & padded, live & ~padded)
    )
    return BlockMask.from_kv_blocks(
        parts, part_numbers, whole, whole_numbers, BLOCK_SIZE=(queries, keys), mask_mod=mask
    )


def _lists(live: Tensor) -> tuple[Tensor, Tensor]:
    counts = live.sum(-1, dtype=torch.int32)
    numbers = (~live).int().argsort(stable=True, dim=-1).int().contiguous()
    return counts[None], numbers[None]


def _tiles(blocks: LiveBlocks) -> dict[str, int]:
    """Return what cards compute at once: their own choice may be more than a block, an error."""
    queries, keys = blocks.block
    return {"BLOCK_M": math.gcd(queries, 128), "BLOCK_N": math.gcd(keys, 64)}


def _run(
    q: Tensor, k: Tensor, v: Tensor, scale: float, blocks: LiveBlocks, operands: Operands
) -> Tensor:
    mask = blocks.kept("flex", block_mask)
    operand = (blocks.moved(x).contiguous() for x in (q, k, v))
    options = _tiles(blocks) if q.is_cuda else None
    with torch._dynamo.config.patch(recompile_limit=_COMPILATIONS):
        out: Tensor = _compiled()(*operand, block_mask=mask, scale=scale, kernel_options=options)
    return blocks.restored(out)


FLEX = ways.add(
    "flex", Way("compiled FlexAttention, blocks skipped", ("cuda", "cpu"), _serves, _run)
)
