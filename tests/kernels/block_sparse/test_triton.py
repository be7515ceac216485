"""The Triton kernels in their interpreter, against the reference in torch, on tiny shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from dq.kernels.block_sparse import Operands, block_sparse_attention, ways
from dq.tokens import TokenLayout
from tests.kernels.block_sparse.cases import FORMATS, operands, sparse

pytest.importorskip("triton")

# The interpreter is chosen when kernels are made: a process of its own, once for all cases.
_PROGRAM = """
import json, sys, torch
from dq.kernels.block_sparse import Operands, ways
from dq.kernels.block_sparse.triton import run
from tests.kernels.block_sparse.cases import CASES, DTYPES, FORMATS, operands, sparse
found = {}
for name, (layout, block, depth) in CASES.items():
    for dtype in DTYPES:
        for formats in FORMATS:
            torch.manual_seed(0)
            q, k, v = operands(layout.tokens, 2, depth, dtype)
            blocks = sparse(layout, 2, block)
            wanted = ways["by-block"].run(q, k, v, 0.2, blocks, Operands(*formats)).float()
            made = run(q, k, v, 0.2, blocks, Operands(*formats)).float()
            distance = float((made - wanted).norm() / wanted.norm())
            found[f"{name} {dtype} {formats}"] = distance
print(json.dumps(found))
"""


def test_kernels_compute_what_the_reference_defines() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PROGRAM],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) > 10
    far = {name: distance for name, distance in found.items() if distance > 4e-3}
    assert not far


@pytest.mark.gpu
@pytest.mark.parametrize("formats", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [(64, 64), (64, 128), (128, 64)], ids=str)
def test_cards_compute_what_the_reference_defines(
    formats: tuple[str, str | None, str | None], dtype: torch.dtype, block: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    layout = TokenLayout((19, 23), 77, text_first=True)
    q, k, v = (x.cuda() for x in operands(layout.tokens, 4, 72, dtype))
    blocks = sparse(layout, 4, block, device="cuda")
    wanted = ways["by-block"].run(q, k, v, 0.12, blocks, Operands(*formats)).float()
    made = block_sparse_attention(q, k, v, 0.12, blocks, Operands(*formats), "triton").float()
    assert float((made - wanted).norm() / wanted.norm()) < 0.02
