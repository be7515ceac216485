"""Attention of which only some blocks are computed: ways to compute it, one chosen by what it is.

A file a way; `reference` defines what all of them compute, `by_block` what those with rounded
operands do.
"""

from dq.kernels.block_sparse.by_group import attend_by_group, live_blocks
from dq.kernels.block_sparse.choice import block_sparse_attention, path
from dq.kernels.block_sparse.way import FLOAT, Operands, Way, ways

__all__ = [
    "FLOAT",
    "Operands",
    "Way",
    "attend_by_group",
    "block_sparse_attention",
    "live_blocks",
    "path",
    "ways",
]
