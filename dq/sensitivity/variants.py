"""One layer with one tensor quantized: its weight alone, or its input alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dq.nn.layers import Layer
from dq.nn.simulated import QuantConv2d, QuantLinear, simulate
from dq.plan import LayerSpec
from dq.ranges import InputRange
from dq.scales import Scales

__all__ = ["input_alone", "weight_alone"]


class _Fixed(nn.Module):
    """A quantizer that has done its work: the same tensor at every call."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        """Return the value that was computed once."""
        return self.value


def weight_alone(
    layer: Layer, spec: LayerSpec, scales: Scales, found: InputRange | None
) -> QuantLinear | QuantConv2d:
    """Return a layer whose weight is quantized.

    Args:
        layer: The float layer.
        spec: How; its input stays float, its kept tokens are kept.
        scales: Of its weight.
        found: What calibration knows about the input; None if it is not static.
    """
    made = simulate(layer, spec, scales)
    matrix = layer.weight.detach().flatten(1)
    value = made.weight_quantizer(matrix).detach().to(layer.weight.dtype)
    made.weight_quantizer = _Fixed(value)
    made.input_quantizers = nn.ModuleList()
    made.kept_input = None if found is None else found.kept
    return made


def input_alone(
    layer: Layer, spec: LayerSpec, found: InputRange | None
) -> QuantLinear | QuantConv2d:
    """Return a layer whose input is quantized and whose weight stays float."""
    no_scales = Scales(torch.ones(1, 1))  # of a weight that is not quantized after all
    made = simulate(layer, spec, no_scales)
    if found is not None:
        made.set_input(*found)
    made.weight_quantizer = nn.Identity()
    return made
