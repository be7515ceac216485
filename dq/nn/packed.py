"""Packed layers: codes and scales as plain tensors, run by the best kernel that the device has.

They are subclasses of the torch layers, so that PEFT, offloading and safetensors take them for
what they are, and hold no tensor subclasses. Scales never change their dtype, whatever the model is
cast to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dq.kernels import Arguments, ConvArguments, Kernel
from dq.nn.changed import convolved, entered
from dq.nn.kept import apart
from dq.nn.layers import Layer, constructor
from dq.nn.packed_layer import PackedLayer
from dq.plan import LayerSpec

__all__ = ["PackedConv2d", "PackedLinear", "packed"]


class PackedLinear(PackedLayer, nn.Linear):
    """A packed linear layer."""

    kind = "linear"
    axis = -1

    def __init__(
        self, layer: nn.Linear, spec: LayerSpec, device: torch.device | None = None
    ) -> None:
        nn.Linear.__init__(self, **constructor(layer))
        self._prepare(layer, spec, device)

    @property
    def float_shape(self) -> tuple[int, ...]:
        """See `PackedLayer`."""
        return self.out_features, self.in_features

    def run_on(self, kernel: Kernel, x: Tensor, a: Arguments) -> Tensor:
        """See `PackedLayer`."""
        entering = entered(self, x, self.transform)
        return self._kept_apart(x, kernel.run(entering, a), self.bias)

    def simulate(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `PackedLayer`."""
        weight = self.float_weight().to(x.dtype)
        y = nn.functional.linear(self._simulated_input(x), weight, bias)
        return self._kept_apart(x, y, bias)

    def _kept_apart(self, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        if self.kept_input is None or self.kept_output is None:
            return y
        every, known, output = self.spec.kept_every, self.kept_input, self.kept_output
        return apart(x, y, every, known, output, self.float_weight, bias)


class PackedConv2d(PackedLayer, nn.Conv2d):
    """A packed convolution."""

    kind = "conv2d"
    axis = 1

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a plain convolution from channel numbers: PEFT builds those of a LoRA like this."""
        if args and isinstance(args[0], int):
            return nn.Conv2d(*args, **kwargs)
        return super().__new__(cls)

    def __init__(
        self, layer: nn.Conv2d, spec: LayerSpec, device: torch.device | None = None
    ) -> None:
        nn.Conv2d.__init__(self, **constructor(layer))
        self._prepare(layer, spec, device)

    @property
    def float_shape(self) -> tuple[int, ...]:
        """See `PackedLayer`."""
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def _servable(self) -> bool:
        if self.input_shift is not None:
            return True  # its images are padded before they come to a kernel
        return self.padding_mode == "zeros" and not isinstance(self.padding, str)

    def _geometry(self) -> ConvArguments:
        padding = [0, 0] if self.input_shift is not None else [int(p) for p in self.padding]
        return ConvArguments(
            list(self.kernel_size), list(self.stride), padding, list(self.dilation), self.groups
        )

    def run_on(self, kernel: Kernel, x: Tensor, a: Arguments) -> Tensor:
        """See `PackedLayer`."""
        return kernel.run(entered(self, x, self.transform), a, self._geometry())

    def simulate(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `PackedLayer`."""
        weight = self.float_weight().to(x.dtype)
        return convolved(self, self._simulated_input(x), weight, bias)


def packed(
    layer: Layer, spec: LayerSpec, device: torch.device | None = None
) -> PackedLinear | PackedConv2d:
    """Return an empty packed layer of the shape of `layer`; fill it with `load_layer`."""
    if isinstance(layer, nn.Linear):
        return PackedLinear(layer, spec, device)
    return PackedConv2d(layer, spec, device)
