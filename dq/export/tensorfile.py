"""A safetensors file that is written tensor by tensor: never more than one lies in memory."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Self

import torch
from torch import Tensor

__all__ = ["TensorFile"]

_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16",
    torch.int32: "I32", torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float32: "F32", torch.float64: "F64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip
_PIECE = 1 << 22  # bytes copied at a time


class TensorFile:
    """A safetensors file in the making: `add` tensors, then `finish` it.

    The header comes first in such a file and is known last. Data waits in temporary files beside
    it, one for each size of an element: readers map the file, and want wide elements aligned.

    Args:
        path: Of the file; it appears when it is finished.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stack = ExitStack()
        self._waiting: dict[int, tuple[IO[bytes], list[tuple[str, Tensor]]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add(self, name: str, tensor: Tensor) -> int:
        """Write one tensor, of any shape, on any device.

        Returns:
            The bytes of its data.
        """
        size = tensor.dtype.itemsize
        if size not in self._waiting:
            temporary = tempfile.TemporaryFile(dir=self.path.parent)  # noqa: SIM115
            self._waiting[size] = self._stack.enter_context(temporary), []
        file, entries = self._waiting[size]
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        file.write(flat.numpy().data)
        entries.append((name, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")))
        return flat.numel()

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write header and data to their place.

        Args:
            metadata: Goes into the header under `__metadata__`.
        """
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        files, end = [], 0
        for _, (file, entries) in sorted(self._waiting.items(), reverse=True):
            files.append(file)
            for name, tensor in entries:
                start, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
                header[name] = {
                    "dtype": _NAMES[tensor.dtype],
                    "shape": list(tensor.shape),
                    "data_offsets": [start, end],
                }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with self.path.open("wb") as target:
            target.write(len(text).to_bytes(8, "little") + text)
            for file in files:
                file.seek(0)
                shutil.copyfileobj(file, target, _PIECE)
