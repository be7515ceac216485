"""The layout of NVIDIA ModelOpt's unified checkpoints: NVFP4, fp8 by row, MXFP8.

That of `dq.export.bfl`, but for three things: weights of float inputs have an algorithm of their
own, without a scale of inputs; MXFP8 is known; and `config.json` lists the algorithm of each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from dq.export.bfl import block_tensors, row_tensors
from dq.export.exporter import Exporter, Layers, exporters
from dq.export.forms import form, mx
from dq.nn import PackedLayer

__all__: list[str] = []

# The words of its config for weights and inputs of each algorithm.
_WIDTHS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "NVFP4": ({"num_bits": 4, "group_size": 16}, {"num_bits": 4, "group_size": 16}),
    "W4A16_NVFP4": ({"num_bits": 4, "group_size": 16}, None),
    "FP8_PER_CHANNEL_PER_TOKEN": ({"num_bits": 8, "strategy": "channel"}, {"num_bits": 8}),
    "MXFP8": ({"num_bits": 8, "group_size": 32}, {"num_bits": 8, "group_size": 32}),
}


def _algorithm(layer: PackedLayer) -> str:
    """Return the name of ModelOpt for what is nearest to a layer.

    It has no fp8 by row and no MXFP8 with float inputs: its readers quantize those.
    """
    found, low = form(layer.spec.weight), layer.spec.input
    if found == "nvfp4":
        return "NVFP4" if low is not None and form(low) == "nvfp4" else "W4A16_NVFP4"
    return "FP8_PER_CHANNEL_PER_TOKEN" if found == "fp8" else "MXFP8"


def _tensors(name: str, layer: PackedLayer) -> dict[str, Tensor]:
    algorithm = _algorithm(layer)
    if algorithm == "MXFP8":
        blocks = mx(layer)
        weight = blocks.elements.view(torch.float8_e4m3fn)
        return {f"{name}.weight": weight, f"{name}.weight_scale": blocks.scales}
    if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
        return row_tensors(name, layer)
    return block_tensors(name, layer, static=algorithm == "NVFP4")


def _group(algorithm: str, targets: list[str]) -> dict[str, Any]:
    weights, inputs = _WIDTHS[algorithm]
    common = {"dynamic": False, "type": "float"}
    group: dict[str, Any] = {"weights": {**common, **weights}, "targets": targets}
    return group if inputs is None else {"input_activations": {**common, **inputs}, **group}


def _config(layers: Layers, others: Sequence[str]) -> dict[str, Any]:
    """Return what ModelOpt writes into `config.json`, by layer if they are not all alike."""
    names: dict[str, list[str]] = {}
    for name, layer in layers.items():
        names.setdefault(_algorithm(layer), []).append(name)
    mixed = len(names) > 1
    config: dict[str, Any] = {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION" if mixed else next(iter(names)),
        "producer": {"name": "dq", "version": version("dq-diffusion")},
        "ignore": sorted(others),
        "config_groups": {
            f"group_{index}": _group(algorithm, sorted(found) if mixed else ["Linear"])
            for index, (algorithm, found) in enumerate(names.items())
        },
    }
    if mixed:
        config["quantized_layers"] = {
            name: {"quant_algo": algorithm, **_size(algorithm)}
            for algorithm, found in names.items()
            for name in sorted(found)
        }
    return config


def _size(algorithm: str) -> dict[str, int]:
    weights, _ = _WIDTHS[algorithm]
    return {key: weights[key] for key in ("group_size",) if key in weights}


exporters.add(
    "modelopt",
    Exporter(
        help="NVIDIA ModelOpt's unified checkpoints: NVFP4, fp8 by row, MXFP8",
        forms=("fp8", "nvfp4", "mxfp8"),
        remedy="fp8, nvfp4, nvfp4-a16, mxfp8",
        loads=lambda kind: (
            "what reads ModelOpt's unified checkpoints; not diffusers, which restores ModelOpt's "
            "pickled state instead"
        ),
        tensors=_tensors,
        config=_config,
    ),
)
