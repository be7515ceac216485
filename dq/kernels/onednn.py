"""Integer linear and convolution on CPUs through oneDNN: u8 x s8, bias and scaling fused.

Inputs are *unsigned* codes: with signed ones the same ops fall into oneDNN's reference code, ten
thousand times slower. Weights are laid out for the shape they really meet; a convolution packed
without it runs fifteen times slower. Either that form is kept beside the stored weight, as long as
that lives, or it is made at every call in scratch memory that layers share (see
`dq.kernels.layout`).

To torch.compile a product is one opaque op; the quantization before it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dq.kernels import reference
from dq.kernels.inputs import Codes, affine_of, quantized
from dq.kernels.integer import integer_weight
from dq.kernels.kernel import (
    SCHEMA,
    Affine,
    Arguments,
    ConvArguments,
    Kernel,
    Site,
    kernels,
    stamp_of,
)
from dq.kernels.layout import Layout, layout_of
from dq.kernels.measured import fastest
from dq.kernels.native import calls, library
from dq.kernels.sample import conv_sample, linear_sample

__all__ = ["conv2d", "forget", "linear", "product", "resident_bytes"]

_MOST_SHAPES = 2  # packed copies kept of one weight; a generation meets one shape, CFG off adds one


@dataclass
class _Prepared:
    """What is kept beside a stored weight.

    Attributes:
        stamp: Tells the contents of weight and bias from later ones.
        scales: Numbers of the input affine. By value: that of a step group may be a tensor that
            lives for one call, and another one at the same address the next.
        affine: Scales of the parts of the input; 1 where they are dynamic.
        bias: float32; zeros if the layer has none.
        zeros: Codes of zero of the weight's rows.
        packed: By input shape: the parts of the weight in oneDNN's layout, or how to make them.
    """

    stamp: tuple[object, ...]
    scales: list[list[float]]
    affine: list[Affine]
    bias: Tensor
    zeros: Tensor
    packed: dict[Hashable, Sequence[Tensor | Layout]] = field(default_factory=dict)


_prepared: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _prepare(a: Arguments) -> _Prepared:
    known: _Prepared | None = _prepared.get(a.weight)
    stamp = stamp_of(a.weight, a.bias)
    scales = [] if a.input_affine is None else a.input_affine.tolist()
    if known is None or known.stamp != stamp:
        rows = len(a.weight)
        bias = torch.zeros(rows) if a.bias is None else a.bias.detach().float()
        unscaled = [Affine(1.0, 1.0, 1 << (a.input_bits - 1))]  # what dynamic inputs are to oneDNN
        zeros = torch.zeros(rows, dtype=torch.int32)
        known = _Prepared(stamp, scales, affine_of(a) or unscaled, bias, zeros)
        _prepared[a.weight] = known
    elif known.scales != scales:
        affine = affine_of(a)
        # Layouts depend on whether zero has the code 0, not on which other one it has.
        same = [e.zero == 0 for e in affine] == [e.zero == 0 for e in known.affine]
        packed = known.packed if same else {}
        known = _Prepared(stamp, scales, affine, known.bias, known.zeros, packed)
        _prepared[a.weight] = known
    return known


def resident_bytes(weight: Tensor) -> int:
    """Return the bytes of the int8 copies that are kept of a stored weight."""
    known: _Prepared | None = _prepared.get(weight)
    kept = [] if known is None else [each for parts in known.packed.values() for each in parts]
    return sum(int(torch.ops.mkldnn._nbytes(each)) for each in kept if isinstance(each, Tensor))


def forget(weight: Tensor) -> None:
    """Drop what is kept beside a stored weight."""
    _prepared.pop(weight, None)


class _Product(Protocol):
    """What linear and convolution differ in, for one part of the input."""

    @property
    def key(self) -> Hashable:
        """What the layout of weights depends on, besides the shapes."""

    def shape(self, rows: int, codes: Tensor) -> tuple[int, ...]:
        """Return the shape of the weights that meet some codes."""

    def pack(self, weight: Tensor, codes: Tensor, zero: int) -> Tensor:
        """Return int8 weights in the layout for codes of that shape."""

    def run(
        self, codes: Tensor, scale: float, zero: int, weight: Tensor, scales: Tensor,
        zeros: Tensor, bias: Tensor | None, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """Multiply, scale and add the bias."""


class _Linear:
    key = "linear"

    def shape(self, rows: int, codes: Tensor) -> tuple[int, ...]:
        return rows, codes.shape[1]

    def pack(self, weight: Tensor, codes: Tensor, zero: int) -> Tensor:
        return torch.ops.onednn.qlinear_prepack(weight, list(codes.shape))

    def run(
        self, codes: Tensor, scale: float, zero: int, weight: Tensor, scales: Tensor,
        zeros: Tensor, bias: Tensor | None, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        return torch.ops.onednn.qlinear_pointwise(
            codes, scale, zero, weight, scales, zeros, bias, 1.0, 0, dtype, "none", [], ""
        )


@dataclass(frozen=True)
class _Conv2d:
    geometry: ConvArguments

    @property
    def key(self) -> Hashable:
        return tuple(map(tuple, self.geometry[:-1])), self.geometry.groups

    def shape(self, rows: int, codes: Tensor) -> tuple[int, ...]:
        return rows, codes.shape[1] // self.geometry.groups, *self.geometry.kernel_size

    def pack(self, weight: Tensor, codes: Tensor, zero: int) -> Tensor:
        scales = torch.ones(len(weight))  # the layout does not depend on them
        return torch.ops.onednn.qconv_prepack(
            weight, scales, 1.0, zero, *self.geometry[1:], list(codes.shape)
        )

    def run(
        self, codes: Tensor, scale: float, zero: int, weight: Tensor, scales: Tensor,
        zeros: Tensor, bias: Tensor | None, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        return torch.ops.onednn.qconv2d_pointwise(
            codes, scale, zero, weight, scales, zeros, bias, *self.geometry[1:], 1.0, 0, dtype,
            "none", [], "",
        )  # fmt: skip


_LINEAR = _Linear()


def _weights(
    product: _Product, codes: Codes, a: Arguments, kept: _Prepared
) -> Sequence[Tensor | Layout]:
    """Return the weight of each part of the input, or how to make it."""
    shape = codes.parts[0].shape  # that of the others follows: a layer's segments are what they are
    key = (product.key, a.keep, torch.get_num_threads(), shape)
    found = kept.packed.get(key)
    if found is None:
        while len(kept.packed) >= _MOST_SHAPES:
            kept.packed.pop(next(iter(kept.packed)))
        found = kept.packed[key] = _packed(product, codes, [e.zero for e in kept.affine], a)
    return found


def _packed(
    product: _Product, codes: Codes, zeros: list[int], a: Arguments
) -> Sequence[Tensor | Layout]:
    shapes = [product.shape(len(a.weight), part) for part in codes.parts]
    if not a.keep and library() is not None:
        found = []
        for part, zero, shape in zip(codes.parts, zeros, shapes, strict=True):
            pack = partial(product.pack, codes=part, zero=zero)
            key = (product.key, tuple(part.shape), shape, zero == 0, torch.get_num_threads())
            found.append(layout_of(key, shape, pack))
        layouts = [layout for layout in found if layout is not None]
        if len(layouts) == len(found):
            return layouts
    whole = integer_weight(a).view(len(a.weight), -1, *shapes[0][2:])
    pieces = whole.split([shape[1] for shape in shapes], dim=1)
    return [
        product.pack(piece.contiguous(), part, zero)
        for piece, part, zero in zip(pieces, codes.parts, zeros, strict=True)
    ]


def _multiply(
    product: _Product, codes: Codes, a: Arguments, kept: _Prepared, dtype: torch.dtype
) -> Tensor:
    """Sum the products of all parts; one static part leaves everything to oneDNN."""
    weights = _weights(product, codes, a, kept)
    static, last = codes.scales is None, len(codes.parts) - 1
    out = dtype if static and last == 0 and dtype in calls.DTYPES else torch.float32
    bias = kept.bias if static and a.bias is not None else None
    total: Tensor | None = None
    first = 0
    for index, (part, each, source) in enumerate(
        zip(codes.parts, kept.affine, weights, strict=True)
    ):
        run = partial(product.run, part, each.scale, each.zero)
        rest = a.scale, kept.zeros, bias if index == last else None, out
        if isinstance(source, Layout):
            with source.lock:
                y = run(source.expand(a, first), *rest)
        else:
            y = run(source, *rest)
        total = y if total is None else total.add_(y)
        first += a.columns * part.shape[1] // (sum(a.segments) or part.shape[1])
    assert total is not None  # there is at least one part
    return total.to(dtype) if static else _rescaled(total, codes.scales, kept.bias, dtype)


def _rescaled(total: Tensor, scales: Tensor | None, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Apply the scales of rows or images, and the bias."""
    assert scales is not None  # of dynamic inputs
    if total.dim() == 2 and dtype in calls.DTYPES and library() is not None:
        return calls.rescale(total, scales, bias, dtype)
    return (total.mul_(scales) + bias.view(-1, *[1] * (total.dim() - 2))).to(dtype)


_TYPES = "Tensor[] codes, Tensor? scales, " + SCHEMA
torch.library.define("dq::onednn_linear", f"({_TYPES}, ScalarType dtype) -> Tensor")
torch.library.define(
    "dq::onednn_conv2d",
    f"({_TYPES}, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
    "int conv_groups, ScalarType dtype) -> Tensor",
)
_FIELDS = len(Arguments._fields)


@torch.library.impl("dq::onednn_linear", "CPU")
def _(codes: list[Tensor], scales: Tensor | None, *rest: Any) -> Tensor:
    a = Arguments(*rest[:_FIELDS])
    return _multiply(_LINEAR, Codes(codes, scales), a, _prepare(a), rest[-1])


@torch.library.register_fake("dq::onednn_linear")
def _(codes: list[Tensor], scales: Tensor | None, *rest: Any) -> Tensor:
    return codes[0].new_empty(codes[0].shape[0], rest[0].shape[0], dtype=rest[-1])


@torch.library.impl("dq::onednn_conv2d", "CPU")
def _(codes: list[Tensor], scales: Tensor | None, *rest: Any) -> Tensor:
    a, g = Arguments(*rest[:_FIELDS]), ConvArguments(*rest[_FIELDS:-1])
    return _multiply(_Conv2d(g), Codes(codes, scales), a, _prepare(a), rest[-1])


@torch.library.register_fake("dq::onednn_conv2d")
def _(codes: list[Tensor], scales: Tensor | None, *rest: Any) -> Tensor:
    g = ConvArguments(*rest[_FIELDS:-1])
    size = [
        (extent + 2 * g.padding[i] - g.dilation[i] * (g.kernel_size[i] - 1) - 1) // g.stride[i] + 1
        for i, extent in enumerate(codes[0].shape[2:])
    ]
    y = codes[0].new_empty(codes[0].shape[0], rest[0].shape[0], *size, dtype=rest[-1])
    return y.contiguous(memory_format=torch.channels_last)


def product(x: Tensor, a: Arguments) -> Tensor:
    """Integer linear layer through oneDNN, whatever its size; `x`: `(R, K)`."""
    kept = _prepare(a)
    return _multiply(_LINEAR, quantized(x, a, kept.affine), a, kept, x.dtype)


_WAYS = {True: ("rows", "oneDNN"), False: ("rows, 4 bits", "oneDNN, 4 bits")}  # by `keep`


def _few(rows: Tensor, a: Arguments) -> bool:
    """Whether an input has so few rows that a call of oneDNN costs more than the product."""
    if library() is None or rows.dtype not in calls.DTYPES or a.segments or rows.stride(1) != 1:
        return False
    if not len(rows):
        return True
    shape = len(rows), a.columns * len(a.weight)
    return fastest("linear", shape, _WAYS[a.keep]).startswith("rows")


def _shared(x: Tensor, rows: Tensor, a: Arguments, kept: _Prepared) -> Codes:
    """Quantize an input once for all layers that see it, such as q, k and v.

    Codes travel with the tensor that they were made of, and die with it.
    """
    if x.is_inference():  # such tensors do not tell whether they have changed
        return quantized(rows, a, kept.affine)
    key = (x._version, a.input_bits, a.input_affine is None, kept.affine)
    known = getattr(x, "_dq_codes", None)
    if known is None or known[0] != key:
        known = key, quantized(rows, a, kept.affine)
        x._dq_codes = known  # type: ignore[attr-defined]
    codes: Codes = known[1]
    return codes


def linear(x: Tensor, a: Arguments) -> Tensor:
    """Integer linear layer; see `dq.kernels.reference.linear`."""
    rows = x.reshape(-1, x.shape[-1])
    if torch.compiler.is_compiling():
        codes = quantized(rows, a, [])
        y = torch.ops.dq.onednn_linear(codes.parts, codes.scales, *a, x.dtype)
    else:
        kept = _prepare(a)
        if _few(rows, a):
            affine = kept.affine[0] if a.input_affine is not None else None
            y = calls.linear_rows(rows, a, affine, kept.bias)
        else:
            y = _multiply(_LINEAR, _shared(x, rows, a, kept), a, kept, x.dtype)
    return y.view(*x.shape[:-1], -1)


def conv2d(x: Tensor, a: Arguments, g: ConvArguments) -> Tensor:
    """Integer convolution; see `dq.kernels.reference.conv2d`."""
    if torch.compiler.is_compiling():
        codes = quantized(x, a, [])
        return torch.ops.dq.onednn_conv2d(codes.parts, codes.scales, *a, *g, x.dtype)
    kept = _prepare(a)
    return _multiply(_Conv2d(g), quantized(x, a, kept.affine), a, kept, x.dtype)


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
