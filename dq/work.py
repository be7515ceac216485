"""Folders that survive a kill: finished stages of a long job, each written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dq.errors import DQError

__all__ = ["Work", "fingerprint"]


def fingerprint(model: nn.Module, settings: Mapping[str, Any]) -> str:
    """Return 16 hex digits that change with the weights of a model or with the settings.

    Every tensor enters with its name, shape and a strided sample of about a hundred values:
    training and fused adapters change all values of a tensor, or nearly all.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        if not tensor.is_meta:
            sample = tensor.detach().flatten()[:: max(1, tensor.numel() // 64)]
            digest.update(sample.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class Work:
    """Stages of one job, under a folder of its own.

    Args:
        folder: Where; made on the first write. None keeps nothing: every stage is computed anew.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def load(self, stage: str, device: torch.device | str = "cpu") -> dict[str, Tensor] | None:
        """Return the tensors of a finished stage, or None if it was not finished here.

        Args:
            stage: Its name.
            device: Where the tensors shall lie.
        """
        if self.folder is None or not (path := self._path(stage)).exists():
            return None
        try:
            # In memory of their own: mapped files lie at odd addresses, where products of some CPU
            # libraries add up in another order, and a resumed run must give the same bits.
            return {name: tensor.to(device, copy=True) for name, tensor in load_file(path).items()}
        except Exception as error:
            raise DQError(f"{path} is damaged ({error}); delete it and run again") from error

    def save(self, stage: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a finished stage: to a temporary file first, then by renaming."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(stage)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")  # processes may share the folder
        save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, temporary)
        temporary.replace(path)

    def _path(self, stage: str) -> Path:
        assert self.folder is not None  # both callers have asked
        return self.folder / f"{stage}.safetensors"
