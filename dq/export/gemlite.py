"""GemLite's layout: whole numbers of 1, 2, 4 and 8 bits packed along the summed features.

A layer's tensors are those of the state of `GemLiteLinearTriton` (GemLite 0.6, Triton kernels for
float inputs): `W_q` `(K bits / 32, N)` int32, the first code of a word in its lowest bits; `scales`
and `zeros` `(G, N)` in the compute dtype, W = (code - zero) scale; `metadata`, twelve numbers;
`orig_shape`. A sign is the code 0 or 1 with the zero 1/2 and twice its scale. Scales are rounded to
the compute dtype, which is all that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dq.export.exporter import Exporter, Layers, exporters
from dq.export.forms import codes_of
from dq.nn import PackedLayer

__all__: list[str] = []

_WORD = 32
_LEAST_GROUP = 16
_WIDTHS = (1, 2, 4, 8)
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # GemLite's numbers for them
_CHANNEL, _BLOCK = (1, 1), (0, 3)  # (mode of channel scales, mode of group scales), both with zeros


def _objection(layer: PackedLayer) -> str | None:
    bits, columns = layer.spec.weight.code_bits, layer.columns
    if bits not in _WIDTHS:
        return f"the layout has 1, 2, 4 and 8 bits, not {bits}"
    size = layer.spec.weight.granularity.size
    if columns % _WORD:
        return f"its {columns} input features are no multiple of {_WORD}"
    if size and size < _LEAST_GROUP:
        return f"the layout has groups of {_LEAST_GROUP} or more, not {size}"
    return None


def _tensors(name: str, layer: PackedLayer) -> dict[str, Tensor]:
    codes, step, zero = codes_of(layer)
    bits, dtype = layer.spec.weight.code_bits, layer.compute_dtype
    each = _WORD // bits
    words = codes.long().unflatten(1, (-1, each)) << (bits * torch.arange(each))
    packed = words.sum(-1)
    packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()
    group = layer.columns // step.shape[1]
    channel_mode, group_mode = _CHANNEL if step.shape[1] == 1 else _BLOCK
    number = _DTYPES[dtype]
    metadata = [
        0, bits, group, (1 << bits) - 1, each, number, number, _DTYPES[torch.float32], number,
        channel_mode, group_mode, 1,
    ]  # fmt: skip
    return {
        f"{name}.W_q": packed.t().contiguous(),
        f"{name}.scales": step.to(dtype).t().contiguous(),
        f"{name}.zeros": torch.full_like(step, zero).to(dtype).t().contiguous(),
        f"{name}.metadata": torch.tensor(metadata, dtype=torch.int32),
        f"{name}.orig_shape": torch.tensor([layer.rows, layer.columns], dtype=torch.int32),
        f"{name}.meta_scale": torch.zeros(()),
    }


def _config(layers: Layers, others: Sequence[str]) -> dict[str, Any]:
    return {
        "quant_method": "gemlite",
        "version": 1,
        "layers": {name: layer.spec.weight.code_bits for name, layer in sorted(layers.items())},
    }


exporters.add(
    "gemlite",
    Exporter(
        help="GemLite's packed linears of 1, 2, 4 and 8 bits, for float inputs",
        forms=("int8", "groups"),
        remedy="binarydm-w1a16, ternary-a16, w4a16, w8a16",
        loads=lambda kind: (
            "GemLite: GemLiteLinearTriton().load_state_dict() of each layer's tensors"
        ),
        tensors=_tensors,
        config=_config,
        objection=_objection,
    ),
)
