"""torch's own attention over live blocks that are gathered first: on any device, differentiable.

Rows of blocks with as many live blocks are worked on together, so that nothing is computed for
nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dq.kernels.block_sparse.way import FLOAT, Operands, Way, ways
from dq.kernels.live_blocks import LiveBlocks

__all__ = ["GATHERED"]

_NUMBERS = {"cpu": 1 << 18}  # of keys that are gathered at a time: what the cache holds
_OTHERWISE = 1 << 26


def _run(
    q: Tensor, k: Tensor, v: Tensor, scale: float, blocks: LiveBlocks, operands: Operands
) -> Tensor:
    size, width = blocks.block
    batch, heads, _, depth = q.shape
    queries = blocks.moved(q).unflatten(2, (-1, size)).flatten(1, 2)  # (B, rows, size, D)
    keys, values = (blocks.moved(x).unflatten(2, (-1, width)).flatten(1, 2) for x in (k, v))
    there = blocks.there.unflatten(1, (-1, width)).flatten(0, 1)  # (blocks of keys, width)
    padded = not bool(there.all())
    counts, numbers = blocks.lists
    offsets = torch.arange(heads, device=q.device) * numbers.shape[2]
    which = (numbers + offsets.view(-1, 1, 1)).flatten(0, 1).long()
    out = torch.empty_like(queries)
    limit = _NUMBERS.get(q.device.type, _OTHERWISE)
    for count in counts.unique().tolist():
        rows = (counts.flatten() == count).nonzero().squeeze(1)
        for part in rows.split(max(1, limit // max(1, batch * count * width * depth))):
            mine = which[part, :count]
            seen = there[mine].flatten(1)[None, :, None, :] if padded else None
            some_keys, some_values = (x[:, mine].flatten(2, 3) for x in (keys, values))
            out[:, part] = F.scaled_dot_product_attention(
                queries[:, part], some_keys, some_values, seen, scale=scale
            )
    return blocks.restored(out.unflatten(1, (heads, -1)).flatten(2, 3))


GATHERED = ways.add(
    "gathered",
    Way(
        "torch's attention over gathered blocks",
        ("cpu", "cuda", "mps", "xpu"),
        lambda q, k, v, blocks, operands: operands == FLOAT,
        _run,
        rank=5,
    ),
)
