"""What tests of exports share: the exported thing, and readers that know nothing of dq."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import load_file

from dq.export import Exported

__all__ = ["Case", "config", "decoded", "levels", "stored"]

_FILE = "diffusion_pytorch_model.safetensors"


class Case(NamedTuple):
    """One export.

    Attributes:
        folder: Of the pipeline.
        component: Name of the denoiser.
        denoiser: The packed one, bfloat16.
        report: What `export` said.
    """

    folder: Path
    component: str
    denoiser: Any
    report: Exported

    @property
    def file(self) -> Path:
        return self.folder / self.component / _FILE


def stored(case: Case) -> dict[str, torch.Tensor]:
    """Returns the tensors of the file."""
    return load_file(case.file)


def config(case: Case) -> dict[str, Any]:
    """Returns `quantization_config`."""
    values = json.loads((case.folder / case.component / "config.json").read_text())
    found: dict[str, Any] = values["quantization_config"]
    return found


def levels(codes: torch.Tensor, kind: type) -> torch.Tensor:
    """Returns the float32 numbers of uint8 codes, one a byte, by ml_dtypes."""
    bits = codes.contiguous().view(torch.uint8).numpy()
    return torch.from_numpy(bits.view(kind).astype(np.float32))


def pairs(packed: torch.Tensor) -> torch.Tensor:
    """Returns the codes of bytes that hold two, the first in the low half."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1)


_MX = {
    "E2M1": ml_dtypes.float4_e2m1fn,
    "E2M3": ml_dtypes.float6_e2m3fn,
    "E3M2": ml_dtypes.float6_e3m2fn,
    "E4M3": ml_dtypes.float8_e4m3fn,
    "E5M2": ml_dtypes.float8_e5m2,
}


def decoded(case: Case) -> dict[str, torch.Tensor]:
    """Returns the plain state dict that a file of bfl, modelopt or mx stands for.

    Weights that were quantized are float32, the others as they lie there.
    """
    state, described = stored(case), config(case).get("layers", {})
    plain = {}
    for name, tensor in state.items():
        layer, _, leaf = name.rpartition(".")
        if leaf in ("weight_scale", "weight_scale_2", "input_scale"):
            continue
        if f"{layer}.weight_scale" in state and leaf == "weight":
            scale = state[f"{layer}.weight_scale"]
            outer = state.get(f"{layer}.weight_scale_2", torch.tensor(1.0))
            plain[name] = _weight(tensor, scale, outer, described.get(layer))
        else:
            plain[name] = tensor
    return plain


def _weight(
    weight: torch.Tensor, scale: torch.Tensor, outer: torch.Tensor, words: dict[str, Any] | None
) -> torch.Tensor:
    if scale.dtype == torch.float32:  # a row
        return levels(weight, ml_dtypes.float8_e4m3fn) * scale[:, None]
    if words is not None:
        codes = pairs(weight) if words["elements_per_byte"] == 2 else weight
        return _blocks(levels(codes, _MX[words["element"]]), scale, outer).view(words["shape"])
    if scale.dtype == torch.uint8:
        return _blocks(levels(weight, ml_dtypes.float8_e4m3fn), scale, outer)
    return _blocks(levels(pairs(weight), ml_dtypes.float4_e2m1fn), scale, outer)


def _blocks(weight: torch.Tensor, scale: torch.Tensor, outer: torch.Tensor) -> torch.Tensor:
    kind = ml_dtypes.float8_e8m0fnu if scale.dtype == torch.uint8 else ml_dtypes.float8_e4m3fn
    step = levels(scale, kind) * outer
    return (weight.unflatten(1, (scale.shape[1], -1)) * step[:, :, None]).flatten(1)
