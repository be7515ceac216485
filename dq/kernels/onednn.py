"""Integer linear and convolution on CPUs through oneDNN: u8 x s8, bias and scaling fused.

Inputs are *unsigned* codes: with signed ones the same ops fall into oneDNN's reference code, ten
thousand times slower. Weights are prepacked for the shape they really meet; a convolution packed
without it runs fifteen times slower. Packed copies live as long as the stored weight that they were
made from, and stay out of graphs that torch.compile makes: to it a layer is one opaque op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dq.kernels import reference
from dq.kernels.integer import InputPart, input_parts, integer_weight
from dq.kernels.kernel import Arguments, ConvArguments, Kernel, Site, kernels
from dq.kernels.sample import conv_sample, linear_sample

__all__ = ["conv2d", "linear", "resident_bytes"]

_MOST_SHAPES = 2  # packed copies kept of one weight; a generation meets one shape, CFG off adds one


class _Packed(NamedTuple):
    """A weight packed for one input shape, in parts like the input."""

    stamp: tuple[int, int]
    parts: list[Tensor]
    zero: Tensor
    bytes: int


_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _stamp(weight: Tensor) -> tuple[int, int]:
    """Tell one content of a tensor from the next: moved or overwritten weights are packed anew."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def _prepacked(
    a: Arguments, parts: list[InputPart], pack: Callable[[Tensor, InputPart], Tensor]
) -> _Packed:
    shapes: dict[tuple[int, ...], _Packed] = _packed.setdefault(a.weight, {})
    key = tuple(parts[0].codes.shape)
    entry = shapes.get(key)
    if entry is None or entry.stamp != _stamp(a.weight):
        weight = integer_weight(a)
        made = [pack(weight, part) for part in parts]
        zero = torch.zeros(len(weight), dtype=torch.int32)
        entry = _Packed(_stamp(a.weight), made, zero, weight.numel())
        while len(shapes) >= _MOST_SHAPES:
            shapes.pop(next(iter(shapes)))
        shapes[key] = entry
    return entry


def resident_bytes(weight: Tensor) -> int:
    """Return the bytes of the packed int8 copies that were made of a stored weight."""
    shapes = _packed.get(weight, {})
    return sum(entry.bytes for entry in shapes.values())


def _epilogue(a: Arguments, part: InputPart, last: bool) -> tuple[float, Tensor | None]:
    """Return input scale and bias that the op itself can apply: those of a static, last part."""
    if a.input_affine is None:
        return 1.0, None
    return float(part.scale), a.bias.float() if last and a.bias is not None else None


def _combine(x: Tensor, a: Arguments, parts: list[InputPart], run: Callable[..., Tensor]) -> Tensor:
    """Sum the products of all parts; one static part leaves everything to the op."""
    single = len(parts) == 1 and a.input_affine is not None
    out_dtype = x.dtype if single and x.dtype in (torch.float32, torch.bfloat16) else torch.float32
    total: Tensor | None = None
    for index, part in enumerate(parts):
        scale, bias = _epilogue(a, part, last=index == len(parts) - 1)
        y = run(index, part, scale, bias, out_dtype)
        total = y if total is None else total.add_(y)
    assert total is not None  # there is at least one part
    if a.input_affine is None:
        total = total.mul_(parts[0].scale)
        if a.bias is not None:
            total += a.bias.float().view(-1, *[1] * (x.dim() - 2))
    return total.to(x.dtype)


@torch.library.custom_op("dq::onednn_linear", mutates_args=())
def _linear_op(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_affine: Tensor | None,
    weight_bits: int,
    columns: int,
    multiplier_bits: int,
    groups: int,
    input_bits: int,
    segments: list[int],
) -> Tensor:
    a = Arguments(
        weight, scale, bias, input_affine, weight_bits, columns, multiplier_bits, groups,
        input_bits, segments,
    )  # fmt: skip
    rows = x.reshape(-1, x.shape[-1])
    parts = input_parts(rows, a)

    def pack(weight: Tensor, part: InputPart) -> Tensor:
        chosen = weight[:, part.channels].contiguous()
        return torch.ops.onednn.qlinear_prepack(chosen, list(part.codes.shape))

    packed = _prepacked(a, parts, pack)

    def run(
        index: int, part: InputPart, scale: float, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        return torch.ops.onednn.qlinear_pointwise(
            part.codes, scale, part.zero, packed.parts[index], a.scale, packed.zero, bias,
            1.0, 0, dtype, "none", [], "",
        )  # fmt: skip

    return _combine(rows, a, parts, run).view(*x.shape[:-1], -1)


@_linear_op.register_fake
def _(x: Tensor, weight: Tensor, *arguments: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("dq::onednn_conv2d", mutates_args=())
def _conv_op(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_affine: Tensor | None,
    weight_bits: int,
    columns: int,
    multiplier_bits: int,
    groups: int,
    input_bits: int,
    segments: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    conv_groups: int,
) -> Tensor:
    a = Arguments(
        weight, scale, bias, input_affine, weight_bits, columns, multiplier_bits, groups,
        input_bits, segments,
    )  # fmt: skip
    geometry = (stride, padding, dilation, conv_groups)
    parts = [
        part._replace(codes=part.codes.contiguous(memory_format=torch.channels_last))
        for part in input_parts(x, a)
    ]

    def pack(weight: Tensor, part: InputPart) -> Tensor:
        chosen = weight.view(len(weight), -1, *kernel_size)[:, part.channels].contiguous()
        scale = 1.0 if a.input_affine is None else float(part.scale)
        return torch.ops.onednn.qconv_prepack(
            chosen, a.scale, scale, part.zero, *geometry, list(part.codes.shape)
        )

    packed = _prepacked(a, parts, pack)

    def run(
        index: int, part: InputPart, scale: float, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        return torch.ops.onednn.qconv2d_pointwise(
            part.codes, scale, part.zero, packed.parts[index], a.scale, packed.zero, bias,
            *geometry, 1.0, 0, dtype, "none", [], "",
        )  # fmt: skip

    return _combine(x, a, parts, run)


@_conv_op.register_fake
def _(x: Tensor, weight: Tensor, *arguments: object) -> Tensor:
    g = ConvArguments(*arguments[-5:])  # type: ignore[arg-type]
    size = [
        (extent + 2 * g.padding[i] - g.dilation[i] * (g.kernel_size[i] - 1) - 1) // g.stride[i] + 1
        for i, extent in enumerate(x.shape[2:])
    ]
    y = x.new_empty(x.shape[0], weight.shape[0], *size)
    return y.contiguous(memory_format=torch.channels_last)


def linear(x: Tensor, a: Arguments) -> Tensor:
    """Integer linear layer; see `dq.kernels.reference.linear`."""
    return _linear_op(x, *a)


def conv2d(x: Tensor, a: Arguments, g: ConvArguments) -> Tensor:
    """Integer convolution; see `dq.kernels.reference.conv2d`."""
    return _conv_op(x, *a, *g)


def _refuses(kind: str) -> Callable[[Site], str | None]:
    def refuses(site: Site) -> str | None:
        if site.kind != kind or site.device != "cpu":
            return f"it is a {kind} kernel for CPUs"
        if site.weight != "int8" or site.input != "int8":
            return "it multiplies integers only"
        return None if torch.backends.mkldnn.is_available() else "this torch has no oneDNN"

    return refuses


def _check_linear(device: torch.device) -> bool:
    x, a = linear_sample(device)
    return torch.allclose(linear(x, a), reference.linear(x, a), rtol=1e-5, atol=1e-5)


def _check_conv(device: torch.device) -> bool:
    x, a, g = conv_sample(device)
    return torch.allclose(conv2d(x, a, g), reference.conv2d(x, a, g), rtol=1e-5, atol=1e-5)


kernels.add(
    "onednn_linear", Kernel("int8 gemm (oneDNN)", 2, _refuses("linear"), linear, _check_linear)
)
kernels.add(
    "onednn_conv2d", Kernel("int8 conv (oneDNN)", 2, _refuses("conv2d"), conv2d, _check_conv)
)
