"""What a way to quantize one layer does to its output, on samples of its input."""

from __future__ import annotations

import torch
from torch import Tensor

from dq.inputs import ChannelRange
from dq.nn.changed import entered
from dq.nn.layers import Layer
from dq.nn.simulated import segments, sharing, simulate
from dq.observers import observers
from dq.plan import LayerSpec
from dq.ranges import InputRange
from dq.scales import Scales
from dq.transform import NO_TRANSFORM, Transform

__all__ = ["observed", "output_error"]


@torch.no_grad()
def output_error(
    layer: Layer,
    x: Tensor,
    spec: LayerSpec,
    range: InputRange | None,
    transform: Transform = NO_TRANSFORM,
    scales: Scales | None = None,
) -> float:
    """Return the squared error of a layer's output, over the square of the output.

    Args:
        layer: The float layer.
        x: Samples of its input, `(n, C)` or `(n, C, H, W)`.
        spec: How it is quantized.
        range: Of its input; None if that is not static.
        transform: How its input is changed, as the spec says.
        scales: Of its weight; None chooses them.
    """
    x = x.to(layer.weight.device, layer.weight.dtype)
    simulated = simulate(layer, spec, scales, transform)
    if range is not None:
        simulated.set_input(*range)
    expected = layer(x).float()
    error = (simulated(x).float() - expected).square().sum()
    return float(error / expected.square().sum().clamp_min(1e-30))


def observed(
    layer: Layer, x: Tensor, spec: LayerSpec, transform: Transform, seen: ChannelRange
) -> InputRange | None:
    """Return the range that a layer's observer would find; None if its input is not static.

    Args:
        layer: The float layer.
        x: Samples of its input.
        spec: How it is quantized.
        transform: How its input is changed.
        seen: What the channels reach over all of the calibration: samples miss what is rare.
    """
    if spec.input is None or not spec.is_static:
        return None
    ends = torch.stack(seen).to(layer.weight.device)
    # A rotation has no ends of its own; those of its input are further out.
    changed = transform._replace(rotation=0).input(ends, -1)
    sizes, axis = segments(layer, spec), -1 if x.dim() == 2 else 1
    parts = entered(layer, x.to(layer.weight), transform).float().split(sizes, axis)
    ranges = []
    for part, end in zip(parts, changed.split(sizes, -1), strict=True):
        observer = observers[spec.input.observer](spec.input)
        observer.update(sharing(part, spec.input, axis))
        observer.update(sharing(end, spec.input, -1))
        ranges.append(observer.range())
    low, high = zip(*ranges, strict=True)
    return InputRange(torch.cat(low), torch.cat(high))
