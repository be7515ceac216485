"""The bytes of the OCP MX specification 1.0, for runtimes of one's own.

`weight` is uint8: e2m1 two to a byte, the first in the low half; elements of 6 and 8 bits one to a
byte (the specification leaves their order open, and torchao keeps 6 bits so, in the low ones).
`weight_scale` is uint8, E8M0, `(N, K / 32)`. Weights of convolutions are `(N, C * kh * kw)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dq.export.exporter import Exporter, Layers, exporters
from dq.export.forms import form, mx
from dq.nn import PackedLayer

__all__: list[str] = []

_BLOCK = 32
# As the specification calls elements, and how many lie in a byte.
_ELEMENTS = {
    "mxfp4": ("E2M1", 2),
    "mxfp6": ("E2M3", 1),
    "mxfp6-e3m2": ("E3M2", 1),
    "mxfp8": ("E4M3", 1),
    "mxfp8-e5m2": ("E5M2", 1),
}


def _tensors(name: str, layer: PackedLayer) -> dict[str, Tensor]:
    blocks = mx(layer)
    return {f"{name}.weight": blocks.elements, f"{name}.weight_scale": blocks.scales}


def _config(layers: Layers, others: Sequence[str]) -> dict[str, Any]:
    """Describe each layer; diffusers refuses a method that it does not know, as it should."""
    described = {}
    for name, layer in layers.items():
        element, in_a_byte = _ELEMENTS[str(form(layer.spec.weight))]
        shape = list(layer.float_shape)
        described[name] = {"element": element, "elements_per_byte": in_a_byte, "shape": shape}
    return {
        "quant_method": "ocp-mx",
        "version": 1,
        "block": _BLOCK,
        "scale": "E8M0",
        "first_element": "low half of the byte",
        "layers": described,
    }


exporters.add(
    "mx",
    Exporter(
        help="the bytes of OCP MX with a description, for runtimes of one's own",
        forms=tuple(_ELEMENTS),
        remedy="mxfp4, mxfp6, mxfp8",
        loads=lambda kind: "runtimes of one's own: config.json describes each layer",
        tensors=_tensors,
        config=_config,
        convolutions=True,
    ),
)
