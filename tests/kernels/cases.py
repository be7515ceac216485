"""Random layers to run kernels on: widths, groups, segments, static and dynamic inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dq.kernels import Arguments, ConvArguments
from dq.quantize import choose_scales, quantize
from dq.spec import Granularity, TensorSpec
from dq.storage import pack_weight

__all__ = ["CONVS", "GEOMETRIES", "LINEARS", "Case"]

PLAIN = ConvArguments([3, 3], [1, 1], [1, 1], [1, 1], 1)


@dataclass(frozen=True)
class Case:
    """One layer with integer weights and inputs.

    Attributes:
        shape: Of the input, channels last for a linear and second for a convolution.
        rows: Output features.
        bits: Width of a weight code; 1 is a sign.
        group: Weights that share a multiplier; 0 for none.
        inputs: "dynamic", or the codes of zero of the segments of a static input.
        input_bits: Width of an input code.
        segments: Sizes of the channel segments.
        geometry: Of a convolution; None makes a linear.
        bias: Whether there is one.
    """

    shape: tuple[int, ...]
    rows: int
    bits: int = 8
    group: int = 0
    inputs: str | tuple[int, ...] = (128,)
    input_bits: int = 8
    segments: tuple[int, ...] = ()
    geometry: ConvArguments | None = None
    bias: bool = True

    @property
    def channels(self) -> int:
        return self.shape[-1] if self.geometry is None else self.shape[1]

    @property
    def columns(self) -> int:
        """K of the layer."""
        if self.geometry is None:
            return self.channels
        height, width = self.geometry.kernel_size
        return self.channels // self.geometry.groups * height * width

    @property
    def spec(self) -> TensorSpec:
        """Of the weight."""
        name = f"int{self.bits}" if self.bits > 1 else "binary"
        if self.group == 0:
            return TensorSpec(name, Granularity("channel"))
        granularity = Granularity("group", self.group)
        return TensorSpec(name, granularity, scale_format=f"uint{self.multiplier_bits}")

    @property
    def multiplier_bits(self) -> int:
        """The most that leave the products within int8; 0 without groups."""
        return min(8 - self.bits, 6) if self.group else 0

    def weight(self) -> Tensor:
        """Return the float weight `(N, K)` before quantization; rows differ in size."""
        generator = torch.Generator().manual_seed(1)
        sizes = torch.exp(torch.randn(self.rows, 1, generator=generator))
        return torch.randn(self.rows, self.columns, generator=generator) * sizes

    def build(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Arguments]:
        """Return an input and the stored tensors; some inputs saturate."""
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(self.shape, generator=generator) * 2
        weight = self.weight()
        scales = choose_scales(weight, self.spec)
        state = pack_weight(quantize(weight, scales, self.spec), scales, self.spec)
        affine = None
        if self.inputs != "dynamic":
            steps = [2.5 / 2**self.input_bits * (2 + index) for index in range(len(self.inputs))]
            affine = torch.tensor(list(zip(steps, self.inputs, strict=True)))
        return x.to(dtype), Arguments(
            weight=state["weight"],
            scale=state["weight_scale"],
            bias=torch.randn(self.rows, generator=generator).to(dtype) if self.bias else None,
            input_affine=affine,
            weight_bits=self.bits,
            columns=self.columns,
            multiplier_bits=self.multiplier_bits,
            groups=self.columns // self.group if self.group else 0,
            input_bits=self.input_bits,
            segments=list(self.segments),
        )


_SHAPES = [(1, 8), (3, 1), (5, 24), (2, 3, 40), (33, 72), (17, 8, 16)]
_WIDTHS = [(bits, group) for bits in range(1, 9) for group in (0, 8) if bits <= 6 or group == 0]

LINEARS = (
    *(Case(shape, rows) for shape in _SHAPES for rows in (1, 16, 37)),
    *(Case((7, 40), 24, *width) for width in _WIDTHS),
    *(Case((7, 40), 24, *width, inputs="dynamic") for width in _WIDTHS),
    *(Case((7, 24), 8, inputs=(zero,)) for zero in (0, 1, 127, 255)),
    *(Case((7, 24), 8, inputs=(1 << (n - 1),), input_bits=n) for n in range(2, 8)),
    *(Case((7, 24), 8, inputs="dynamic", input_bits=n) for n in range(2, 8)),
    Case((7, 24), 8, bias=False),
    Case((7, 24), 8, inputs="dynamic", bias=False),
    Case((3, 5, 24), 9, inputs=(0, 200), segments=(16, 8)),
    Case((6, 24), 9, bits=4, group=8, inputs=(255, 3, 128), segments=(5, 1, 18), bias=False),
)

GEOMETRIES = (
    PLAIN,
    ConvArguments([1, 1], [1, 1], [0, 0], [1, 1], 1),
    ConvArguments([3, 3], [2, 2], [1, 1], [1, 1], 1),
    ConvArguments([3, 1], [1, 2], [2, 0], [1, 1], 1),
    ConvArguments([3, 3], [1, 1], [2, 2], [2, 2], 1),
    ConvArguments([3, 3], [1, 1], [1, 1], [1, 1], 4),
    ConvArguments([3, 3], [1, 1], [1, 1], [1, 1], 8),
)

CONVS = (
    *(
        Case((2, 8, 7, 5), 16, inputs=inputs, geometry=geometry)
        for geometry in GEOMETRIES
        for inputs in ("dynamic", (0,), (77,), (255,))
    ),
    *(Case((1, 8, 6, 6), 5, *width, geometry=PLAIN) for width in _WIDTHS),
    *(Case((2, 8, 6, 6), 5, *width, inputs="dynamic", geometry=PLAIN) for width in _WIDTHS),
    *(
        Case((1, 8, 6, 6), 5, inputs=(1 << (n - 1),), input_bits=n, geometry=PLAIN)
        for n in range(2, 8)
    ),
    Case((2, 3, 9, 4), 7, geometry=PLAIN, bias=False),
    Case((2, 3, 9, 4), 7, inputs="dynamic", geometry=PLAIN, bias=False),
    Case((2, 13, 6, 6), 4, inputs=(12, 240), segments=(8, 5), geometry=PLAIN),
    Case((2, 13, 6, 6), 4, inputs=(0, 9), segments=(1, 12), geometry=GEOMETRIES[1], bias=False),
)
