"""Random orders, masks and operands for block-sparse attention."""

from __future__ import annotations

import torch
from torch import Tensor

from dq.kernels.live_blocks import LiveBlocks
from dq.tokens import TokenLayout, candidates

__all__ = ["CASES", "DTYPES", "FORMATS", "operands", "sparse"]

# For Triton's interpreter: layout, block, features of a head.
CASES = {
    "even": (TokenLayout((8, 8)), (32, 32), 32),
    "ragged, text": (TokenLayout((5, 7), 9, text_first=True), (16, 32), 40),
    "video": (TokenLayout((2, 3, 4), 3), (32, 16), 72),
}
DTYPES = (torch.float32, torch.float16)  # the interpreter's products of bfloat16 are wrong
FORMATS = (
    (None, None, None),
    ("int8", None, None),
    ("int8", "int8", "uint7"),
    ("int8", "e4m3", "e4m3"),
)


def sparse(
    layout: TokenLayout,
    heads: int,
    block: tuple[int, int],
    density: float = 0.5,
    device: str = "cpu",
) -> LiveBlocks:
    """Return random masks, heads in different orders."""
    orders = candidates(layout.grid, tiles=True)
    tables = [layout.table(orders[head % len(orders)], max(block)) for head in range(heads)]
    size = len(tables[0])
    live = torch.rand(heads, size // block[0], size // block[1]) < density
    for row in range(live.shape[1]):
        live[:, row, row * block[0] // block[1]] = True
    return LiveBlocks(torch.stack(tables).to(device), live.to(device), block)


def operands(tokens: int, heads: int, depth: int, dtype: torch.dtype) -> list[Tensor]:
    """Return q, k and v as models have them: the heads of a token side by side."""
    return [torch.randn(2, tokens, heads, depth).to(dtype).transpose(1, 2) for _ in range(3)]
