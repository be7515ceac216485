"""Layers with simulated quantization: a float weight and two quantizers, differentiable."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dq.errors import DQError
from dq.nn.changed import changed_bias, conv_groups, convolved, entered
from dq.nn.kept import apart
from dq.nn.layers import Layer, constructor, input_channels
from dq.nn.quantizer import Quantizer
from dq.nn.split import SplitQuantizer, chosen_by_size, columns_of
from dq.nn.steps import Steps
from dq.nn.stepwise import stepwise
from dq.plan import LayerSpec
from dq.scales import Scales
from dq.spec import TensorSpec
from dq.transform import NO_TRANSFORM, Transform

__all__ = [
    "QuantConv2d",
    "QuantLayer",
    "QuantLinear",
    "fake_input",
    "segments",
    "sharing",
    "simulate",
]


def segments(layer: Layer, spec: LayerSpec) -> tuple[int, ...]:
    """Return the sizes of the channel segments of a layer's input that have a scale each.

    Raises:
        DQError: If the spec's splits do not sum to the channels of the layer.
    """
    channels = input_channels(layer)
    if spec.input_splits and sum(spec.input_splits) != channels:
        raise DQError(f"input splits {spec.input_splits} do not sum to its {channels} channels")
    return spec.input_splits or (channels,)


def sharing(x: Tensor, spec: TensorSpec, axis: int) -> Tensor:
    """Return a static input as `(G, n)`: the elements of a row share a scale."""
    if spec.granularity.kind != "group":
        return x.reshape(1, -1)
    return x.movedim(axis, 0).reshape(x.shape[axis] // spec.granularity.size, -1)


def fake_input(
    x: Tensor, quantizers: Iterable[Callable[[Tensor], Tensor]], sizes: tuple[int, ...], axis: int,
    spec: TensorSpec,
) -> Tensor:  # fmt: skip
    """Fake-quantize an input along its channel axis, one quantizer a segment; keeps its dtype."""
    done = []
    by_pixel = axis == 1 and spec.granularity.kind == "group"
    for quantizer, part in zip(quantizers, x.split(sizes, dim=axis), strict=True):
        if by_pixel:
            pixels = part.permute(0, 2, 3, 1)
            y = quantizer(pixels.flatten(0, 2)).view(pixels.shape).permute(0, 3, 1, 2)
        else:
            y = quantizer(part.flatten(0, -2) if axis == -1 else part.flatten(1)).view(part.shape)
        done.append(y.to(x.dtype))
    return torch.cat(done, dim=axis) if len(done) > 1 else done[0]


class QuantLayer:
    """What both layers share. Mixed in before the torch class.

    Attributes:
        spec: How the layer is quantized.
        weight_quantizer: Fake-quantizes the weight, seen as `(N, K)`.
        input_quantizers: One a segment of the input; empty if the input stays float.
        kept_input: `(K,)`, the token that is computed apart, if there is one: `dq.nn.kept`.
        codes: `(N, K)` uint8, what a rounding method has made of the weight; None where it is
            rounded to nearest.
        binarizer: Makes the weight of the matrix instead of the quantizer, where it learns to be of
            few bits; see `dq.binarizers`.
        salient: `(S,)` float32, numbers of the input channels whose weights have more bits, or
            None.
        latent: Gives the matrix that is quantized, where it is learned; see `dq.nn.latent`.
        latent_bias: `(N,)`, the bias that is learned with it, of the changed input.
        transform: How input and weight are changed before; changes nothing by default.
        table: `(T, N)` float32, outputs at the timesteps of the spec, or None.
        output_affine: `(G, 2, N)` float32, scale and shift of the output in each of its step
            groups, or None.
        steps: Knows the timestep, where something depends on it.
    """

    spec: LayerSpec
    weight: Tensor
    bias: Any  # Linear and Conv2d of torch type it differently
    weight_quantizer: Any  # a Quantizer, or a SplitQuantizer where there are salient channels
    salient: Tensor | None = None
    input_quantizers: nn.ModuleList
    kept_input: Tensor | None = None
    codes: Tensor | None = None
    binarizer: nn.Module | None
    latent: nn.Module | None
    latent_bias: nn.Parameter | None
    transform: Transform = NO_TRANSFORM
    table: Tensor | None = None
    output_affine: Tensor | None = None
    steps: Steps | None = None
    axis: int  # of the channels

    @property
    def depends_on_step(self) -> bool:
        """Whether it has to know the timestep."""
        return self.spec.depends_on_step

    def _take(
        self, layer: Layer, spec: LayerSpec, scales: Scales | None, transform: Transform
    ) -> None:
        """Share the parameters of `layer`; choose the scales of its weight if none are given."""
        if spec.kept_every and not isinstance(layer, nn.Linear):
            raise DQError("kept tokens are those of a linear layer; images have none")
        if transform.spec != spec.transform:
            raise DQError(f"its input is to be {spec.transform}, and no numbers are there for it")
        self.spec = spec
        self.transform = transform
        self.binarizer = self.latent = self.latent_bias = None
        self.weight = layer.weight
        self.bias = layer.bias
        self.weight_quantizer = Quantizer(spec.weight)
        if spec.salient is not None:
            if conv_groups(self) != 1:  # its rows see different channels
                raise DQError("salient channels: the groups of a convolution have none in common")
            size = input_channels(layer), spec.salient_channels
            self.set_salient(chosen_by_size(self.matrix(), *size))
        elif scales is None:
            self.weight_quantizer.fit(self.matrix())
        else:
            self.weight_quantizer.set_scales(scales)
        self.sizes = segments(layer, spec)
        quantizers = [] if spec.input is None else [Quantizer(spec.input) for _ in self.sizes]
        self.input_quantizers = nn.ModuleList(quantizers)

    def set_input(self, low: Tensor, high: Tensor, kept: Tensor | None = None) -> None:
        """Take over what calibration has found out about the input.

        Args:
            low: `(S,)` float32, the smallest value of each segment or group of channels; a row of
                these for each step group, if there are any.
            high: Likewise, the largest.
            kept: `(K,)` float32, the token that is computed apart.
        """
        count = len(self.input_quantizers)
        ends = (end.reshape(-1, end.shape[-1]).chunk(count, 1) for end in (low, high))
        for quantizer, mine in zip(self.input_quantizers, zip(*ends, strict=True), strict=True):
            assert isinstance(quantizer, Quantizer)  # the list holds nothing else
            quantizer.set_range(*mine)
        self.kept_input = kept

    def set_salient(self, channels: Tensor) -> None:
        """Say which input channels have more bits, and choose all scales anew.

        Args:
            channels: `(S,)` numbers, ascending.
        """
        self.salient = channels.float()
        matrix = self.matrix()
        self.weight_quantizer = SplitQuantizer.fitted(matrix, self.spec, self.salient_columns())

    def salient_columns(self) -> Tensor:
        """Return which columns of the matrix they are, `(K,)` bool."""
        assert isinstance(self, (nn.Linear, nn.Conv2d))  # it is mixed into these only
        assert self.salient is not None  # asked for where the spec has some
        return columns_of(self.salient, input_channels(self), self.matrix().shape[1])

    def take_over(self, before: QuantLayer) -> None:
        """Keep what does not depend on how weight and input are quantized.

        Args:
            before: The layer that this one replaces.
        """
        if before.spec.tabled == self.spec.tabled:
            self.table = before.table
        if before.spec.output_groups == self.spec.output_groups:
            self.output_affine = before.output_affine

    def matrix(self) -> Tensor:
        """Return the weight `(N, K)` that is quantized, floating point."""
        if self.latent is not None:
            matrix: Tensor = self.latent()
            return matrix
        if self.spec.transform is None:
            return self.weight.flatten(1)
        return self.transform.weight(self.weight, conv_groups(self)).flatten(1)

    def rounded_weight(self) -> Tensor:
        """Return the weight that is computed with, float32, in the layer's own shape."""
        if self.codes is not None:
            rounded = self.weight_quantizer.decode(self.codes)
        elif self.binarizer is not None:
            rounded = self.binarizer(self.matrix())
        else:
            rounded = self.weight_quantizer(self.matrix())
        return rounded.view(self.weight.shape)

    def changed_bias(self) -> Tensor | None:
        """Return the bias that belongs to the changed input."""
        if self.latent_bias is not None:
            return self.latent_bias.to(self.weight.dtype)
        return changed_bias(self.weight, self.bias, self.transform, conv_groups(self))

    def operand(self, x: Tensor) -> Tensor:
        """Return what the weight meets: the input padded, changed and fake-quantized."""
        x = entered(self, x, self.transform)
        if len(self.input_quantizers) and self.spec.input is not None:
            x = fake_input(x, self.input_quantizers, self.sizes, self.axis, self.spec.input)
        return x

    def product(self, x: Tensor) -> Tensor:
        """Return the output, before what depends on the timestep."""
        raise AssertionError("each layer class has its own")

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., in)` to `(..., out)`, or `(B, in, H, W)` to `(B, out, H', W')`."""
        return stepwise(self, x, self.product)


class QuantLinear(QuantLayer, nn.Linear):
    """A linear layer with simulated quantization."""

    axis = -1

    def __init__(
        self,
        layer: nn.Linear,
        spec: LayerSpec,
        scales: Scales | None = None,
        transform: Transform = NO_TRANSFORM,
    ) -> None:
        nn.Linear.__init__(self, **constructor(layer))
        self._take(layer, spec, scales, transform)

    def product(self, x: Tensor) -> Tensor:
        """See `QuantLayer.product`."""
        operand, weight = self.operand(x), self.rounded_weight().to(x.dtype)
        y = nn.functional.linear(operand, weight, self.changed_bias())
        every, known = self.spec.kept_every, self.kept_input
        if not every or known is None:
            return y
        output = nn.functional.linear(known.to(x.dtype), self.weight, self.bias)
        return apart(x, y, every, known, output, lambda: weight, self.bias)


class QuantConv2d(QuantLayer, nn.Conv2d):
    """A convolution with simulated quantization."""

    axis = 1

    def __init__(
        self,
        layer: nn.Conv2d,
        spec: LayerSpec,
        scales: Scales | None = None,
        transform: Transform = NO_TRANSFORM,
    ) -> None:
        nn.Conv2d.__init__(self, **constructor(layer))
        self._take(layer, spec, scales, transform)

    def product(self, x: Tensor) -> Tensor:
        """See `QuantLayer.product`."""
        weight = self.rounded_weight().to(x.dtype)
        return convolved(self, self.operand(x), weight, self.changed_bias())


def simulate(
    layer: Layer,
    spec: LayerSpec,
    scales: Scales | None = None,
    transform: Transform = NO_TRANSFORM,
) -> QuantLinear | QuantConv2d:
    """Return the simulated form of a layer; it shares the layer's parameters.

    Args:
        layer: The float layer.
        spec: How it is quantized.
        scales: Of its weight, if they have been chosen before.
        transform: How its input is changed, as the spec says.
    """
    if isinstance(layer, nn.Linear):
        return QuantLinear(layer, spec, scales, transform)
    return QuantConv2d(layer, spec, scales, transform)
