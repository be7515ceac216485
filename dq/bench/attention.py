"""Block-sparse attention against dense, in one run: `dq bench --attention`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dq.bench.report import Machine
from dq.bench.timing import Times, interleave, threads_set
from dq.errors import DQError
from dq.kernels.attention import attention, serves
from dq.kernels.block_sparse import FLOAT, Operands, ways
from dq.kernels.live_blocks import LiveBlocks
from dq.tables import aligned

__all__ = ["SparseReport", "run"]

_OPERANDS = (FLOAT, Operands("int8"), Operands("int8", "int8", "uint7"),
             Operands("int8", "e4m3", "e4m3"))  # fmt: skip
_LEFT_OUT = ("sdpa", "by-block", "dense")  # they save nothing
_DENSE = "sdpa"


@dataclass(frozen=True)
class SparseReport:
    """What was measured.

    Attributes:
        shape: Images, heads, tokens and features of a head.
        machine: Where.
        times: By competitor: dense ones by name, others by name and density.
    """

    shape: tuple[int, int, int, int]
    machine: Machine
    times: dict[str, Times]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        times = {name: t.milliseconds for name, t in self.times.items()}
        return {"shape": list(self.shape), "machine": vars(self.machine), "milliseconds": times}

    def save(self, path: Path) -> None:
        """Write JSON."""
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    def __str__(self) -> str:
        dense = {n: t.milliseconds for n, t in self.times.items() if "@" not in n}
        strongest = min(dense.values())
        rows = [("", "ms", "of dense sdpa, same dtype", "of the fastest dense")]
        for name, times in self.times.items():
            dtype = name.split(" ")[0]
            base = dense[f"{dtype} {_DENSE}"]
            took = times.milliseconds
            rows.append((name, f"{took:.2f}", f"{took / base:.2f}", f"{took / strongest:.2f}"))
        images, heads, tokens, depth = self.shape
        here = self.machine
        return "\n".join(
            [
                f"{images} x {heads} heads x {tokens} tokens x {depth}, order and rounding in it",
                *aligned(rows),
                f"{here.where}, {here.threads} threads, torch {here.torch}, {here.date}",
            ]
        )


@torch.no_grad()
def run(
    tokens: int = 4096,
    heads: int = 8,
    depth: int = 64,
    batch: int = 1,
    densities: Sequence[float] = (0.5, 0.3, 0.2),
    block: int = 64,
    threads: int = 1,
    repeats: int = 7,
    device: str = "cpu",
    asked: Sequence[str] = (),
) -> SparseReport:
    """Time dense attention and all ways to leave blocks out, each once in every round.

    Args:
        tokens: Of an image.
        heads: Of an attention, each with its own order and as many live blocks in every row.
        depth: Features of a head.
        batch: Images.
        densities: Shares of the blocks that are computed.
        block: Queries and keys of a block.
        threads: Of the CPU.
        repeats: Rounds, of which medians are taken.
        device: Where.
        asked: Names of ways; none for all that would be chosen.

    Raises:
        DQError: If one that was asked for is unknown, or cannot compute this here.
    """
    names = list(asked) or [n for n, w in ways.items() if n not in _LEFT_OUT and w.rank is not None]
    dtypes = (torch.bfloat16,) if device.startswith("cuda") else (torch.bfloat16, torch.float32)
    runs: dict[str, Callable[[], object]] = {}
    for dtype in dtypes:
        word = str(dtype).removeprefix("torch.")
        generator = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(batch, tokens, heads, depth, generator=generator)
            .to(device, dtype)
            .transpose(1, 2)
            for _ in range(3)
        )
        scale = depth**-0.5
        runs[f"{word} {_DENSE}"] = partial(F.scaled_dot_product_attention, q, k, v, scale=scale)
        if device.startswith("cuda"):
            runs[f"{word} cudnn"] = partial(_cudnn, q, k, v, scale)
        elif serves(q, k, v, scale):
            runs[f"{word} dq dense"] = partial(attention, q, k, v, scale)
        for density in densities:
            blocks = _blocks(tokens, heads, block, density, q.device)
            for name in names:
                for operands in _OPERANDS:
                    way = ways[name]
                    if q.device.type in way.devices and way.serves(q, k, v, blocks, operands):
                        few = "" if operands == FLOAT else f" {'/'.join(map(str, operands))}"
                        title = f"{word} {name}{few} @ {density:g}"
                        runs[title] = partial(way.run, q, k, v, scale, blocks, operands)
    idle = [name for name in asked if not any(f" {name} " in run and "@" in run for run in runs)]
    if idle:
        raise DQError(f"{', '.join(idle)} cannot compute this on {device}; leave --way out for all")
    machine = Machine.here(threads, device)
    if device.startswith("cuda"):
        runs = {name: partial(_finished, call) for name, call in runs.items()}
    with threads_set(threads):
        times = interleave(runs, repeats, "timing attention")
    return SparseReport((batch, heads, tokens, depth), machine, times)


def _blocks(
    tokens: int, heads: int, block: int, density: float, device: torch.device
) -> LiveBlocks:
    """Return random orders, and as many random blocks in every row."""
    generator = torch.Generator().manual_seed(0)
    padding = -tokens % block
    tables = [torch.randperm(tokens, generator=generator) for _ in range(heads)]
    table = F.pad(torch.stack(tables), (0, padding), value=-1).int()
    count = (tokens + padding) // block
    kept = max(1, round(density * count))
    live = torch.rand(heads, count, count, generator=generator).argsort(-1) < kept
    blocks = LiveBlocks(table.to(device), live.to(device), (block, block))
    _ = blocks.lists  # what is made once for many calls is not measured
    return blocks


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, scale=scale)


def _finished(call: Callable[[], object]) -> None:
    call()
    torch.cuda.synchronize()
