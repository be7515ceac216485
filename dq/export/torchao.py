"""torchao's own tensors, flattened into safetensors as torchao and diffusers read them.

Weights are those of the packed layers, bit for bit. Inputs that are quantized in the format of the
weights stay so, by torchao's kernels: it finds their scales at run time, one a token, where dq had
calibrated ones too. Others stay float. Only `nn.Linear` has such weights in diffusers.
"""

from __future__ import annotations

import importlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dq.errors import DQError
from dq.export.exporter import Exporter, Layers, exporters
from dq.export.forms import form, fp8, int8, mx, nvfp4
from dq.nn import PackedLayer

__all__: list[str] = []

_OLDEST = (0, 18)
_TILE = 16  # rows, and columns, of what hardware multiplies
_ELEMENTS: Mapping[str | None, Any] = {  # dtypes and names, as torchao calls them
    "mxfp4": torch.float4_e2m1fn_x2,
    "mxfp6": "fp6_e2m3",
    "mxfp6-e3m2": "fp6_e3m2",
    "mxfp8": torch.float8_e4m3fn,
    "mxfp8-e5m2": torch.float8_e5m2,
}
_EMULATED = ("mxfp6", "mxfp6-e3m2", "mxfp8-e5m2")  # torchao has no kernel for them


def _check() -> None:
    try:
        found = str(importlib.import_module("torchao").__version__)
    except ImportError:
        found = "none"
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise DQError(
            f"export to torchao needs torchao {oldest} or later, and there is {found}: "
            f"pip install 'torchao>={oldest}'"
        )


def _like_weights(layer: PackedLayer) -> bool:
    """Whether inputs have the format of the weights, and sizes are those that hardware takes."""
    low, found = layer.spec.input, form(layer.spec.weight)
    if low is None or found is None:
        return False
    if found in ("int8", "fp8"):
        same = low.format == {"int8": "int8", "fp8": "e4m3"}[found]
        same = same and low.granularity.kind != "group"
    else:
        same = form(low) == found
    return same and (found == "int8" or (layer.rows % _TILE == 0 and layer.columns % _TILE == 0))


def _objection(layer: PackedLayer) -> str | None:
    found, low = form(layer.spec.weight), layer.spec.input
    if found not in _ELEMENTS:
        return None
    if low is None or form(low) != found:
        return f"torchao multiplies {found} by {found} only, not by {low or 'float inputs'}"
    if low.scale_rule == "search":
        return "torchao finds scales of inputs by floor, ceil, even or rceil, not by search"
    return None


def _tensor(layer: PackedLayer) -> Any:
    """Return the weight as torchao's tensor."""
    found = form(layer.spec.weight)
    if found in _ELEMENTS:
        return _mx_tensor(layer)
    return {"int8": _int8_tensor, "fp8": _fp8_tensor, "nvfp4": _nvfp4_tensor}[str(found)](layer)


def _int8_tensor(layer: PackedLayer) -> Any:
    from torchao.quantization import Int8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    levels, scale = int8(layer)
    inputs = QuantizeTensorToInt8Kwargs(PerRow()) if _like_weights(layer) else None
    return Int8Tensor(
        levels, scale[:, None], [1, layer.columns], layer.compute_dtype, act_quant_kwargs=inputs
    )


def _fp8_tensor(layer: PackedLayer) -> Any:
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import Float8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    levels, scale = fp8(layer)
    known = {"block_size": [1, layer.columns], "dtype": layer.compute_dtype}
    if _like_weights(layer):
        inputs = QuantizeTensorToFloat8Kwargs(granularity=PerRow())
        known |= {"act_quant_kwargs": inputs, "mm_config": Float8MMConfig(use_fast_accum=True)}
    return Float8Tensor(levels, scale[:, None], **known)


def _nvfp4_tensor(layer: PackedLayer) -> Any:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, QuantizeTensorToNVFP4Kwargs

    blocks = nvfp4(layer)
    inputs = QuantizeTensorToNVFP4Kwargs(is_swizzled_scales=True, use_dynamic_per_tensor_scale=True)
    return NVFP4Tensor(
        blocks.elements, blocks.scales, 16, layer.compute_dtype, blocks.outer,
        act_quant_kwargs=inputs if _like_weights(layer) else None,
    )  # fmt: skip


def _mx_tensor(layer: PackedLayer) -> Any:
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import MXTensor, QuantizeTensorToMXKwargs
    from torchao.quantization.quantize_.common import KernelPreference

    blocks, low, found = mx(layer), layer.spec.input, form(layer.spec.weight)
    assert low is not None  # refused
    element = _ELEMENTS[found]
    emulated = found in _EMULATED or not _like_weights(layer)
    kernel = KernelPreference.EMULATED if emulated else KernelPreference.AUTO
    data = blocks.elements.view(element) if layer.spec.weight.grid.bits == 8 else blocks.elements
    inputs = QuantizeTensorToMXKwargs(
        element, 32, ScaleCalculationMode(low.scale_rule), kernel, is_swizzled_scales=not emulated
    )
    scales = blocks.scales.view(torch.float8_e8m0fnu)
    return MXTensor(data, scales, element, 32, layer.compute_dtype, kernel, inputs, False)


def _described(layer: PackedLayer) -> Any:
    """Return torchao's config that stands for a layer."""
    from torchao import quantization as ao
    from torchao.prototype import mx_formats

    found, both = form(layer.spec.weight), _like_weights(layer)
    if found in _ELEMENTS:
        element = _ELEMENTS[found]
        return mx_formats.MXDynamicActivationMXWeightConfig(
            activation_dtype=element, weight_dtype=element
        )
    if found == "nvfp4" and both:
        return mx_formats.NVFP4DynamicActivationNVFP4WeightConfig(use_triton_kernel=False)
    if found == "nvfp4":
        return mx_formats.NVFP4WeightOnlyConfig()
    if found == "fp8":
        dynamic = ao.Float8DynamicActivationFloat8WeightConfig
        return dynamic(granularity=ao.PerRow()) if both else ao.Float8WeightOnlyConfig()
    return ao.Int8DynamicActivationInt8WeightConfig() if both else ao.Int8WeightOnlyConfig()


def _config(layers: Layers, others: Sequence[str]) -> dict[str, Any]:
    """Return what diffusers asks for: one config, that of most layers. The tensors know theirs."""
    from torchao.core.config import config_to_dict

    found = Counter(json.dumps(config_to_dict(_described(layer))) for layer in layers.values())
    (most, _), *_ = found.most_common(1)
    return {"quant_method": "torchao", "quant_type": {"default": json.loads(most)}}


def _flat(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    plain, described = flatten_tensor_state_dict(tensors)
    return plain, {name: described[name] for name in tensors}


def _header(described: Mapping[str, str]) -> dict[str, str]:
    return {"format": "pt", **described, "tensor_names": json.dumps(list(described))}


exporters.add(
    "torchao",
    Exporter(
        help="torchao's tensors in safetensors: int8, fp8, NVFP4 and MX, as diffusers loads them",
        forms=("int8", "fp8", "nvfp4", *map(str, _ELEMENTS)),
        remedy="w8a8-dynamic, w8a16, w4a8, fp8, nvfp4, mxfp4, mxfp6, mxfp8",
        loads=lambda kind: "diffusers: DiffusionPipeline.from_pretrained(FOLDER), with torchao",
        tensors=lambda name, layer: {f"{name}.weight": _tensor(layer)},
        config=_config,
        objection=_objection,
        check=_check,
        flat=_flat,
        header=_header,
    ),
)
