"""Changes of a layer's input that its weight undoes: exact in full precision, easier to quantize.

With z a shift and s a scale for each input channel, and H an orthogonal matrix,

    x' = ((x - z) / s) H,    W' = W diag(s) H,    b' = b + W z,    so that    W' x' + b' = W x + b.

SmoothQuant and LLM-FP4 choose s, Outlier Suppression+ z and s, rotations H; see `dq.methods`. H is
made of Hadamard blocks over neighbouring channels. Convolutions that are shifted pad their input
before it is changed: zeros outside the image are zeros of x, not of x'.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from dq.errors import DQError, check_known

__all__ = ["NO_TRANSFORM", "Transform", "TransformSpec", "hadamard"]


@dataclass(frozen=True)
class TransformSpec:
    """Which parts a transform has.

    Args:
        shift: Whether there is a shift z.
        scale: Whether there is a scale s.
        rotation: Size of the Hadamard blocks, a power of two; 0 for none.
    """

    shift: bool = False
    scale: bool = False
    rotation: int = 0

    def __post_init__(self) -> None:
        if self.rotation and (self.rotation < 2 or self.rotation & (self.rotation - 1)):
            raise DQError(f"a rotation has blocks of 2, 4, 8, ... channels, not {self.rotation}")
        if not (self.shift or self.scale or self.rotation):
            raise DQError("a transform without shift, scale and rotation does nothing")

    def bytes(self, channels: int) -> int:
        """Return what is stored of it: a float32 a channel for the shift, and for the scale."""
        return 4 * channels * (self.shift + self.scale)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read JSON values.

        Raises:
            DQError: For an unknown key, or parts that cannot be.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        check_known("key of a transform", values, known)
        return cls(**values)

    def __str__(self) -> str:
        words = ["shifted"] * self.shift + ["scaled"] * self.scale
        return ", ".join(words + ([f"rotated by {self.rotation}"] if self.rotation else []))


@functools.cache
def hadamard(size: int) -> Tensor:
    """Return Sylvester's Hadamard matrix of a power of two, symmetric and orthonormal, float32."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


class Transform(NamedTuple):
    """The numbers of a transform.

    Attributes:
        shift: z, `(C,)` float32, or None.
        scale: s, `(C,)` float32, positive, or None.
        rotation: Size of the Hadamard blocks; 0 for none.
    """

    shift: Tensor | None = None
    scale: Tensor | None = None
    rotation: int = 0

    @property
    def spec(self) -> TransformSpec | None:
        """What it has; None if it does nothing."""
        parts = self.shift is not None, self.scale is not None, self.rotation
        return TransformSpec(*parts) if any(parts) else None

    def input(self, x: Tensor, axis: int) -> Tensor:
        """Return x', in the dtype of `x`.

        Args:
            x: Any shape.
            axis: Of the channels.
        """
        y = x.movedim(axis, -1)
        if self.shift is not None:
            y = y - self.shift.to(x.dtype)
        if self.scale is not None:
            y = y * self.scale.reciprocal().to(x.dtype)
        return self._rotated(y).movedim(-1, axis)

    def weight(self, weight: Tensor, groups: int = 1) -> Tensor:
        """Return W', float32.

        Args:
            weight: `(N, C / groups, ...)`.
            groups: Of a convolution.
        """
        return self._by_channel(weight, groups, inverse=False)

    def restored(self, weight: Tensor, groups: int = 1) -> Tensor:
        """Return the W that a W' was made of, float32."""
        return self._by_channel(weight, groups, inverse=True)

    def offset(self, weight: Tensor, groups: int = 1) -> Tensor | None:
        """Return W z, `(N,)` float32; None without a shift.

        Args:
            weight: W, `(N, C / groups, ...)`.
            groups: Of a convolution.
        """
        if self.shift is None:
            return None
        rows, width = weight.shape[:2]
        summed = weight.float().reshape(groups, rows // groups, width, -1).sum(-1)
        return (summed @ self.shift.view(groups, width, 1)).view(rows)

    def _by_channel(self, weight: Tensor, groups: int, inverse: bool) -> Tensor:
        rows, width = weight.shape[:2]
        # (groups, rows of each, kernel positions, channels of each)
        y = weight.float().reshape(groups, rows // groups, width, -1).transpose(2, 3)
        if self.rotation and width % self.rotation:
            raise DQError(f"rotations by {self.rotation} do not fit {width} channels")
        y = self._rotated(y) if inverse else y
        if self.scale is not None:
            scale = self.scale.view(groups, 1, 1, width)
            y = y / scale if inverse else y * scale
        y = y if inverse else self._rotated(y)
        return y.transpose(2, 3).reshape(weight.shape)

    def _rotated(self, x: Tensor) -> Tensor:
        """Rotate the last dimension; the matrix is its own inverse."""
        if not self.rotation:
            return x
        matrix = hadamard(self.rotation).to(x.device, x.dtype)
        return (x.unflatten(-1, (-1, self.rotation)) @ matrix).flatten(-2)


NO_TRANSFORM = Transform()
