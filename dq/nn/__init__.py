"""Quantized layers: simulated ones to calibrate and tune, packed ones to store and run."""

from dq.nn.layers import describe, matrix_shape
from dq.nn.packed import PackedConv2d, PackedLinear
from dq.nn.packed_layer import PackedLayer
from dq.nn.quantizer import Quantizer
from dq.nn.simulated import QuantConv2d, QuantLayer, QuantLinear
from dq.nn.swap import (
    empty_packed,
    exchanged,
    install,
    keep_int8,
    pack_model,
    packed_layers,
    plain_layers,
    uninstall,
    unpack_model,
)

__all__ = [
    "PackedConv2d",
    "PackedLayer",
    "PackedLinear",
    "QuantConv2d",
    "QuantLayer",
    "QuantLinear",
    "Quantizer",
    "describe",
    "empty_packed",
    "exchanged",
    "install",
    "keep_int8",
    "matrix_shape",
    "pack_model",
    "packed_layers",
    "plain_layers",
    "uninstall",
    "unpack_model",
]
