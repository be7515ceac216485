"""What a kernel is, and how one is chosen."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dq.registry import Registry

__all__ = [
    "SCHEMA",
    "Affine",
    "Arguments",
    "ConvArguments",
    "Kernel",
    "Site",
    "choose",
    "kernels",
    "stamp_of",
]


@dataclass(frozen=True)
class Site:
    """What a layer needs of a kernel.

    Blocks are "nvfp4" (16 e2m1 elements and an e4m3 scale), "mxfp4" (32 e2m1 elements and a power
    of two) and "mxfp8" (the same of other floats whose levels e4m3 has too).

    Args:
        kind: "linear" or "conv2d".
        device: Device type, "cpu" or "cuda".
        rows: Output features N.
        columns: Features K that are summed over.
        weight: "int8" (integer levels, one float scale a row), "fp8" (floats whose levels e4m3 has
            too, likewise), one of these blocks, or "other".
        input: "int8" (codes of at most 8 bits, affine), "fp8" (as in weights; one scale a tensor or
            token), "float" (left as it is), one of these blocks, or "other".
        groups: Groups of a convolution; 1 for linears.
    """

    kind: str
    device: str
    rows: int
    columns: int
    weight: str
    input: str
    groups: int = 1


class Arguments(NamedTuple):
    """The stored tensors of a layer whose weight and input are both in a low-bit format.

    Attributes:
        weight: `(N, bytes)` uint8, of convolutions `(N, bytes, 1, 1)`; a row holds K packed codes,
            then G packed multipliers, of integers minus one; see `dq.storage`.
        scale: `(N,)` float32; `(1,)` of blocks.
        bias: `(N,)` floating point or None.
        input_affine: `(S, 2)` float32, scale and code of zero of each segment of input channels;
            None for dynamic inputs.
        weight_bits: Width of a weight code; levels are signed.
        columns: K, the number of weight codes in a row.
        multiplier_bits: Width of a multiplier code.
        groups: G, the number of multipliers in a row; 0 without.
        input_bits: Width of an input code.
        segments: Sizes of the S channel segments; empty if S is 1.
        keep: Whether a kernel may keep the numbers that codes stand for, a byte each, beside them;
            otherwise it makes them anew at every call.
        weight_format: Name of the format of the codes; read where the kind of the site leaves it
            open.
        input_format: Likewise of the input.
        input_rule: How the scales of blocks of the input are found; see `dq.blocks`.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    input_affine: Tensor | None
    weight_bits: int
    columns: int
    multiplier_bits: int
    groups: int
    input_bits: int
    segments: list[int]
    keep: bool = True
    weight_format: str = ""
    input_format: str = ""
    input_rule: str = ""


# The same for the schema of a custom op, in the same order.
SCHEMA = (
    "Tensor weight, Tensor scale, Tensor? bias, Tensor? input_affine, int weight_bits, "
    "int columns, int multiplier_bits, int groups, int input_bits, int[] segments, bool keep, "
    "str weight_format, str input_format, str input_rule"
)


def stamp_of(*tensors: Tensor | None) -> tuple[int, ...]:
    """Tell one content of tensors from the next: moved or overwritten ones are another."""
    stamp: list[int] = []
    for tensor in tensors:
        if tensor is not None:
            stamp += tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
    return tuple(stamp)


class Affine(NamedTuple):
    """Scale of an input segment, one over it (float32 numbers), and the code of zero."""

    scale: float
    inverse: float
    zero: int


class ConvArguments(NamedTuple):
    """Geometry of a convolution, as in `torch.nn.functional.conv2d`."""

    kernel_size: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


@dataclass(frozen=True)
class Kernel:
    """One way to run a layer.

    Args:
        path: What reports print, e.g. "int8 gemm (oneDNN)".
        priority: The highest that serves is taken.
        refuses: Says why it cannot serve a site, or None if it can.
        run: Called as `run(x, arguments)`, for convolutions `run(x, arguments, geometry)`.
        check: Compares `run` with the reference on one known product; True if they agree.
    """

    path: str
    priority: int
    refuses: Callable[[Site], str | None]
    run: Callable[..., Tensor]
    check: Callable[[torch.device], bool]


kernels: Registry[Kernel] = Registry("kernel", home="dq.kernels")


def choose(site: Site) -> Kernel | None:
    """Return the best kernel that serves `site`, or None if the layer must unpack."""
    for _, kernel in sorted(kernels.items(), key=lambda entry: -entry[1].priority):
        if kernel.refuses(site) is None and _trusted(kernel, site.device):
            return kernel
    return None


@functools.cache
def _trusted(kernel: Kernel, device: str) -> bool:
    """Run the self-test once a process; some builds return wrong products (pytorch 136746)."""
    try:
        agrees = kernel.check(torch.device(device))
        reason = "its product is wrong"
    except (RuntimeError, ValueError) as error:  # as torch has it for what it does not take
        agrees, reason = False, str(error).splitlines()[0]
    if not agrees:
        warnings.warn(f"dq: kernel {kernel.path} is not used on {device}: {reason}", stacklevel=3)
    return agrees
