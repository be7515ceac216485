"""The layout of Black Forest Labs' checkpoints, which diffusers reads: fp8 by row, and NVFP4.

It takes NVFP4 over from ModelOpt and asks for a fixed scale of the inputs. dq finds theirs at run
time, so there is none to write: `INPUT_SCALE` stands in its place, and only hardware that
multiplies NVFP4 uses it at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dq.export.exporter import Exporter, Layers, exporters
from dq.export.forms import form, fp8, nvfp4
from dq.nn import PackedLayer

__all__ = ["INPUT_SCALE", "block_tensors", "row_tensors"]

# A block of inputs then has the scale e4m3(largest magnitude / 6): of full precision for largest
# magnitudes from 0.094 to 2688, and nothing below 2688 is cut off.
INPUT_SCALE = 1.0


def row_tensors(name: str, layer: PackedLayer) -> dict[str, Tensor]:
    """Return an fp8 weight: `weight` `(N, K)` float8_e4m3fn, `weight_scale` `(N,)` float32."""
    weight, scale = fp8(layer)
    return {f"{name}.weight": weight, f"{name}.weight_scale": scale}


def block_tensors(name: str, layer: PackedLayer, static: bool = True) -> dict[str, Tensor]:
    """Return an NVFP4 weight.

    Args:
        name: Of the layer.
        layer: With a weight of form nvfp4.
        static: Whether there is a scale of the inputs.

    Returns:
        `weight` `(N, K / 2)` uint8, `weight_scale` `(N, K / 16)` float8_e4m3fn in plain order,
        `weight_scale_2` and, if static, `input_scale`, `()` float32.
    """
    blocks = nvfp4(layer)
    tensors = {
        f"{name}.weight": blocks.elements,
        f"{name}.weight_scale": blocks.scales,
        f"{name}.weight_scale_2": blocks.outer,
    }
    return {**tensors, f"{name}.input_scale": torch.tensor(INPUT_SCALE)} if static else tensors


def _tensors(name: str, layer: PackedLayer) -> dict[str, Tensor]:
    return (row_tensors if form(layer.spec.weight) == "fp8" else block_tensors)(name, layer)


def _config(layers: Layers, others: Sequence[str]) -> dict[str, Any]:
    # Enough for diffusers to refuse the file where it cannot read it, in from_pretrained: it would
    # take fp8 weights for plain ones, and leave out their scales with a warning.
    return {"quant_method": "bfl"}


def _loads(kind: str) -> str:
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    if kind not in SINGLE_FILE_LOADABLE_CLASSES:
        return f"what reads this layout; not diffusers, whose {kind} has no from_single_file"
    return (
        f"diffusers: {kind}.from_single_file(FILE, config=FOLDER, subfolder=COMPONENT, "
        "quantization_config=BFLQuantizationConfig())"
    )


exporters.add(
    "bfl",
    Exporter(
        help="Black Forest Labs: fp8 by row and NVFP4, as diffusers' own reader takes them",
        forms=("fp8", "nvfp4"),
        remedy="fp8, fp8-w8a16, nvfp4, nvfp4-a16",
        loads=_loads,
        tensors=_tensors,
        config=_config,
    ),
)
