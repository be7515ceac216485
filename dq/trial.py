"""What a way to quantize one layer does to its output, on samples of its input."""

from __future__ import annotations

import torch
from torch import Tensor

from dq.calibrate import InputRange
from dq.nn.changed import entered
from dq.nn.layers import Layer
from dq.nn.simulated import simulate
from dq.plan import LayerSpec
from dq.scales import Scales
from dq.transform import NO_TRANSFORM, Transform

__all__ = ["output_error"]


@torch.no_grad()
def output_error(
    layer: Layer,
    x: Tensor,
    spec: LayerSpec,
    transform: Transform = NO_TRANSFORM,
    scales: Scales | None = None,
    range: InputRange | None = None,
) -> float:
    """Return the squared error of a layer's output, over the square of the output.

    Args:
        layer: The float layer.
        x: Samples of its input, `(n, C)` or `(n, C, H, W)`.
        spec: How it is quantized.
        transform: How its input is changed, as the spec says.
        scales: Of its weight; None chooses them.
        range: Of static inputs; None takes that of the samples.
    """
    x = x.to(layer.weight.device, layer.weight.dtype)
    simulated = simulate(layer, spec, scales, transform)
    if spec.is_static and range is None:
        parts = entered(layer, x, transform).float().split(simulated.sizes, simulated.axis)
        low, high = zip(*(torch.aminmax(part) for part in parts), strict=True)
        range = InputRange(torch.stack(low), torch.stack(high))
    if range is not None:
        simulated.set_input(*range)
    expected = layer(x).float()
    error = (simulated(x).float() - expected).square().sum()
    return float(error / expected.square().sum().clamp_min(1e-30))
