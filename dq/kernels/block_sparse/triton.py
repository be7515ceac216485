"""The Triton kernels as a way: order, rounding and skipped blocks in two launches."""

from __future__ import annotations

import functools
import importlib.util
import logging
import math

import torch
from torch import Tensor

from dq.kernels.block_sparse.way import FLOAT, Operands, Way, ways
from dq.kernels.live_blocks import LiveBlocks
from dq.tokens.layout import TokenLayout

__all__ = ["TRITON", "run"]

logger = logging.getLogger("dq")

# Formats that the kernels compute with, and how the values go in: as they are, int8, float8.
_VALUES = {
    FLOAT: 0,
    Operands("int8"): 0,
    Operands("int8", "int8", "uint7"): 1,
    Operands("int8", "e4m3", "e4m3"): 2,
}
_LARGEST = {"int8": 127.0, "e4m3": 448.0}
_DTYPES = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn}
_NEAR = 0.02  # relative distance from the reference that the self-test allows


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _serves(q: Tensor, k: Tensor, v: Tensor, blocks: LiveBlocks, operands: Operands) -> bool:
    tensors = (q, k, v)
    return (
        operands in _VALUES
        and _installed()
        and all(size >= 16 and math.log2(size).is_integer() for size in blocks.block)
        and all(x.dtype in (torch.float16, torch.bfloat16) for x in tensors)
        and q.shape[-1] <= 256
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
        and _works(operands, q.dtype, q.device.index)
    )


@functools.cache
def _works(operands: Operands, dtype: torch.dtype, device: int | None) -> bool:
    """Run the self-test once a card: a kernel that is compiled wrongly must not draw pictures."""
    from dq.kernels.block_sparse.by_block import BY_BLOCK

    place = torch.device("cuda", device or 0)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 90, 64, generator=generator).to(place, dtype) for _ in range(3))
    table = TokenLayout((9, 10)).table("hw", 64)
    live = torch.tensor([[1, 0], [1, 1]], dtype=torch.bool)
    tables, masks = table.expand(2, -1).contiguous(), live.expand(2, -1, -1)
    blocks = LiveBlocks(tables.to(place), masks.to(place), (64, 64))
    wanted = BY_BLOCK.run(q, k, v, 0.125, blocks, operands).float()
    try:
        found = run(q, k, v, 0.125, blocks, operands).float()
    except Exception as error:  # compilers fail in many ways
        logger.warning("attention by triton is left out on %s: %s", place, error)
        return False
    near = bool((found - wanted).norm() < _NEAR * wanted.norm())
    if not near:
        logger.warning("attention by triton is left out on %s: its self-test failed", place)
    return near


def run(
    q: Tensor, k: Tensor, v: Tensor, scale: float, blocks: LiveBlocks, operands: Operands
) -> Tensor:
    """Compute it; see `Way.run`."""
    from dq.kernels.block_sparse import triton_kernels as kernels

    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, tokens, depth = q.shape
    places = blocks.table.shape[1]
    queries, keys = blocks.block
    wide = max(16, 1 << (depth - 1).bit_length())
    interpreted = q.device.type == "cpu"
    none = q.new_empty(1, dtype=torch.float32)

    def rounded(
        x: Tensor, size: int, name: str, mean: Tensor | None = None, by_feature: bool = False
    ) -> tuple[Tensor, Tensor]:
        shape = (batch, heads, depth, places) if by_feature else (batch, heads, places, depth)
        out = x.new_empty(shape, dtype=_DTYPES[name])
        out = out.transpose(2, 3) if by_feature else out
        each = (depth,) if by_feature else ()
        scales = x.new_empty((batch, heads, places // size, *each), dtype=torch.float32)
        kernels.round_rows[places // size, batch * heads](
            x, none if mean is None else mean, blocks.table, out, scales,
            *x.stride()[:3], heads, places, depth, *out.stride()[2:],
            SIZE=size, DEPTH=wide, LARGEST=_LARGEST[name], FLOATS=name == "e4m3",
            BY_FEATURE=by_feature, CENTRED=mean is not None, INTERPRETED=interpreted,
        )  # fmt: skip
        return out, scales

    (query, q_scales), (key, k_scales), (value, v_scales) = (q, none), (k, none), (v, none)
    if operands.query_key is not None:
        query, q_scales = rounded(q, queries, operands.query_key)
        mean = k.mean(2, dtype=torch.float32)
        key, k_scales = rounded(k, keys, operands.query_key, mean)
    if operands.value is not None:
        value, v_scales = rounded(v, keys, operands.value, by_feature=True)
    out = q.new_empty(batch, tokens, heads, depth).transpose(1, 2)
    counts, numbers = blocks.lists
    kernels.attend[places // queries, batch * heads](
        query, key, value, q_scales, k_scales, v_scales, blocks.table, counts, numbers, out,
        *query.stride()[:3], *key.stride()[:3], *value.stride(), *out.stride()[:3],
        heads, places, depth, places // keys, scale * math.log2(math.e),
        QUERIES=queries, KEYS=keys, DEPTH=wide,
        SCORES=int(operands.query_key is not None), VALUES=_VALUES[operands],
        INTERPRETED=interpreted,
    )  # fmt: skip
    return out


TRITON = ways.add("triton", Way("triton kernel, blocks skipped", ("cuda",), _serves, run, rank=1))
