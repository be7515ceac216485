"""Checksums of stored tensors: a flipped bit or a swapped file must not become a picture."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dq.errors import DQError
from dq.nn.stored import TENSORS
from dq.nn.token_site import SITE, TOKEN_TENSORS
from dq.plan import Plan

__all__ = ["check_readable", "digest", "metadata", "of", "of_model", "read"]

_KEY = "dq_crc32"


def of(tensor: Tensor) -> int:
    """Return the CRC-32 of the bytes of a tensor."""
    flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    return zlib.crc32(flat.numpy().data)


def digest(crcs: Mapping[str, int], plan: Plan) -> str:
    """Return 8 hex digits for a plan and all of its packed tensors, from the checksum of each.

    The specs enter too: plans that differ only in their inputs store the same tensors.
    """
    words = []
    for layer, spec in sorted(plan.layers.items()):
        words.append(f"{layer} {json.dumps(spec.to_dict(), sort_keys=True)}")
        names = (f"{layer}.{leaf}" for leaf in TENSORS)
        words += [f"{crcs[name]:08x}" for name in names if name in crcs]
    for site, operands in sorted(plan.attention.items()):
        words.append(f"{site} {json.dumps(operands.to_dict(), sort_keys=True)}")
        names = (f"{site}.{SITE}.{leaf}" for leaf in TOKEN_TENSORS)
        words += [f"{crcs[name]:08x}" for name in names if name in crcs]
    return f"{zlib.crc32(','.join(words).encode()):08x}"


def of_model(model: nn.Module, plan: Plan) -> str:
    """Return the digest of a live, packed model."""
    sites = [f"{name}.{SITE}" for name, spec in plan.attention.items() if spec.tokens is not None]
    crcs = {
        f"{name}.{leaf}": of(tensor)
        for name in (*plan.layers, *sites)
        for leaf, tensor in model.get_submodule(name).state_dict().items()
    }
    return digest(crcs, plan)


def metadata(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the entry for a safetensors header: the checksums of all tensors, sorted by name."""
    return {_KEY: ",".join(f"{of(state_dict[name]):08x}" for name in sorted(state_dict))}


def read(files: Iterable[str] | None, names: Iterable[str]) -> dict[str, int]:
    """Return the checksums that the headers of safetensors files promise, by tensor name.

    Each shard promises the checksums of all tensors, so the first file speaks for every one.

    Raises:
        DQError: If a file is truncated or not a safetensors file, or its list does not fit `names`.
    """
    names = sorted(names)
    promised: dict[str, int] = {}
    for file in files or ():
        if not str(file).endswith(".safetensors"):
            continue
        text = _header(file).get(_KEY)
        if text is None or promised:
            continue
        try:
            promised = {n: int(c, 16) for n, c in zip(names, text.split(","), strict=True)}
        except ValueError as error:
            raise DQError(
                f"{file}: its header does not list a checksum for each of {len(names)} tensors; it "
                "is damaged or of another checkpoint: copy or download the checkpoint again"
            ) from error
    return promised


def check_readable(file: str | Path) -> None:
    """Refuse a safetensors file that is truncated or has a damaged header, without reading tensors.

    Raises:
        DQError: If it cannot be opened.
    """
    _header(file)


def _header(file: str | Path) -> dict[str, str]:
    """Return the metadata of a safetensors file."""
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise DQError(
            f"{file} cannot be read ({error}); it is truncated or damaged: "
            "copy or download the checkpoint again"
        ) from error
