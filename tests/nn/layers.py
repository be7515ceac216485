"""Float layers to quantize, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dq.nn import QuantConv2d, QuantLinear
from dq.nn.simulated import simulate
from dq.plan import LayerSpec

__all__ = ["LAYERS", "build", "calibrated"]

LAYERS: dict[str, tuple[Callable[[], nn.Linear | nn.Conv2d], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(24, 10), (3, 5, 24)),
    "linear without bias": (lambda: nn.Linear(16, 7, bias=False), (6, 16)),
    "conv": (lambda: nn.Conv2d(8, 6, 3, padding=1), (2, 8, 7, 5)),
    "strided conv": (lambda: nn.Conv2d(8, 5, (3, 1), stride=2, bias=False), (1, 8, 9, 4)),
    "grouped conv": (lambda: nn.Conv2d(16, 8, 1, groups=2), (2, 16, 4, 4)),
    "same conv": (lambda: nn.Conv2d(8, 4, 3, padding="same", dilation=2), (1, 8, 6, 6)),
    "reflect conv": (
        lambda: nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect"),
        (1, 8, 6, 6),
    ),
}
"""Name to a function that builds a layer, and the shape of an input."""


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear | nn.Conv2d, Tensor]:
    """Return a layer and an input; equal values at every call."""
    make, shape = LAYERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().to(dtype), (torch.randn(shape) + 0.3).to(dtype)


def calibrated(
    layer: nn.Linear | nn.Conv2d, x: Tensor, spec: LayerSpec
) -> QuantLinear | QuantConv2d:
    """Return the simulated form of a layer, its static inputs calibrated on most of `x`."""
    simulated = simulate(layer, spec)
    if spec.input is not None and not spec.input.dynamic:
        for quantizer, part in zip(
            simulated.input_quantizers, x.split(simulated.sizes, simulated.axis), strict=True
        ):
            low, high = torch.aminmax(part.float())
            quantizer.set_range(low * 0.8, high * 0.8)
    return simulated
