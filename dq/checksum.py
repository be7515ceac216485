"""Checksums of stored tensors: a flipped bit or a swapped file must not become a picture."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dq.errors import DQError
from dq.nn.packed import TENSORS
from dq.plan import Plan

__all__ = ["digest", "metadata", "of", "of_model", "read"]

_KEY = "dq_crc32"


def of(tensor: Tensor) -> int:
    """Return the CRC-32 of the bytes of a tensor."""
    flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    return zlib.crc32(memoryview(flat.numpy()))


def digest(crcs: Mapping[str, int], plan: Plan) -> str:
    """Return 8 hex digits for all packed tensors of a plan, from the checksum of each."""
    names = (f"{layer}.{leaf}" for layer in sorted(plan.layers) for leaf in TENSORS)
    text = ",".join(f"{crcs[name]:08x}" for name in names if name in crcs)
    return f"{zlib.crc32(text.encode()):08x}"


def of_model(model: nn.Module, plan: Plan) -> str:
    """Return the digest of a live, packed model."""
    crcs = {
        f"{name}.{leaf}": of(tensor)
        for name in plan.layers
        for leaf, tensor in model.get_submodule(name).state_dict().items()
    }
    return digest(crcs, plan)


def metadata(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the entry for a safetensors header: the checksums of all tensors, sorted by name."""
    return {_KEY: ",".join(f"{of(state_dict[name]):08x}" for name in sorted(state_dict))}


def read(files: Iterable[str] | None, names: Iterable[str]) -> dict[str, int]:
    """Return the checksums that the headers of safetensors files promise, by tensor name.

    Raises:
        DQError: If a file is truncated or not a safetensors file.
    """
    names = sorted(names)
    for file in files or ():
        if not str(file).endswith(".safetensors"):
            continue
        try:
            with safe_open(file, framework="pt") as opened:
                text = (opened.metadata() or {}).get(_KEY)
        except (SafetensorError, OSError) as error:
            raise DQError(
                f"{file} cannot be read ({error}); it is truncated or damaged: "
                "copy or download the checkpoint again"
            ) from error
        if text is not None and text.count(",") + 1 == len(names):
            return {n: int(c, 16) for n, c in zip(names, text.split(","), strict=True)}
    return {}
