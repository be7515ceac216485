"""Weights of which some input channels have more bits than the others.

Channels are kept apart, not single weights: a channel costs a number to name, and products stay
dense (PTQ1.61, Zhao et al. 2025, arXiv 2502.13179, keeps a fifth of them at 4 bits; PB-LLM, Shang
et al. 2024, arXiv 2310.00034, single weights). The codes of a row are those of all other columns,
packed, then those of the salient ones; its scales likewise.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dq.nn.quantizer import Quantizer
from dq.plan import LayerSpec
from dq.spec import TensorSpec
from dq.storage import stored_shapes, unpack_weight

__all__ = [
    "SplitQuantizer",
    "chosen_by_size",
    "columns_of",
    "joined",
    "split_shapes",
    "unpack_split",
]


def columns_of(channels: Tensor, count: int, columns: int) -> Tensor:
    """Return which columns of a matrix belong to some input channels.

    Args:
        channels: `(S,)` numbers of channels.
        count: C, how many there are.
        columns: K of the matrix, a multiple of C: each channel has K / C that follow each other.

    Returns:
        `(K,)` bool.
    """
    mask = torch.zeros(count, dtype=torch.bool, device=channels.device)
    mask[channels.long()] = True
    return mask.repeat_interleave(columns // count)


def chosen_by_size(matrix: Tensor, count: int, salient: int) -> Tensor:
    """Return the channels of largest weights, ascending, `(S,)` float32.

    Args:
        matrix: `(N, K)` floating point.
        count: C, how many channels there are.
        salient: S, how many are wanted.
    """
    sizes = matrix.detach().float().square().sum(0).view(count, -1).sum(1)
    return sizes.topk(salient).indices.sort().values.float()


def joined(rest: Tensor, dense: Tensor, mask: Tensor) -> Tensor:
    """Return the matrix `(N, K)` of its other and its salient columns."""
    whole = rest.new_empty(len(rest), len(mask))
    whole[:, ~mask] = rest
    whole[:, mask] = dense
    return whole


class SplitQuantizer(nn.Module):
    """Quantizes salient columns by one spec and the others by another.

    Args:
        rest: Of the other columns.
        dense: Of the salient ones.
        mask: `(K,)` bool, which these are.
    """

    mask: Tensor

    def __init__(self, rest: nn.Module, dense: Quantizer, mask: Tensor) -> None:
        super().__init__()
        self.rest, self.dense = rest, dense
        self.register_buffer("mask", mask, persistent=False)

    @classmethod
    def fitted(cls, matrix: Tensor, spec: LayerSpec, mask: Tensor) -> SplitQuantizer:
        """Return one whose scales are chosen for a matrix."""
        assert spec.salient is not None  # asked for by the spec
        rest, dense = Quantizer(spec.weight), Quantizer(spec.salient)
        rest.fit(matrix[:, ~mask])
        dense.fit(matrix[:, mask])
        return cls(rest, dense, mask)

    def forward(self, matrix: Tensor) -> Tensor:
        """Return the quantized and dequantized `(N, K)` matrix, float32."""
        rest, dense = self.rest(matrix[:, ~self.mask]), self.dense(matrix[:, self.mask])
        return joined(rest, dense, self.mask)

    def encode(self, matrix: Tensor) -> Tensor:
        """Return the codes `(N, K)` uint8, of each column in its own format."""
        rest, dense = self._both()
        parts = rest.encode(matrix[:, ~self.mask]), dense.encode(matrix[:, self.mask])
        return joined(*parts, self.mask)

    def decode(self, codes: Tensor) -> Tensor:
        """Invert `encode`, up to rounding."""
        rest, dense = self._both()
        parts = rest.decode(codes[:, ~self.mask]), dense.decode(codes[:, self.mask])
        return joined(*parts, self.mask)

    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        """Return what is stored; see the head of this file."""
        rest, dense = self._both()
        parts = rest.pack(codes[:, ~self.mask]), dense.pack(codes[:, self.mask])
        scales = [p["weight_scale"].reshape(len(codes), -1) for p in parts]
        return {
            "weight": torch.cat([p["weight"] for p in parts], 1),
            "weight_scale": torch.cat(scales, 1),
        }

    def _both(self) -> tuple[Quantizer, Quantizer]:
        assert isinstance(self.rest, Quantizer)  # a binarizer has put one in its place
        return self.rest, self.dense


def split_shapes(
    spec: LayerSpec, rows: int, columns: int, channels: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of what is stored of an `(N, K)` weight."""
    widths = {"weight": 0, "weight_scale": 0}
    for part, size in _parts(spec, columns, channels):
        for name, (shape, _) in stored_shapes(part, rows, size).items():
            widths[name] += shape[1] if len(shape) > 1 else 1
    return {
        "weight": ((rows, widths["weight"]), torch.uint8),
        "weight_scale": ((rows, widths["weight_scale"]), torch.float32),
    }


def unpack_split(
    state: Mapping[str, Tensor], spec: LayerSpec, mask: Tensor, channels: int
) -> Tensor:
    """Return the float32 weight `(N, K)` that stored tensors stand for."""
    values, at, scale_at = [], 0, 0
    rows = len(state["weight"])
    for part, size in _parts(spec, len(mask), channels):
        shapes = stored_shapes(part, rows, size)
        width, scales = shapes["weight"][0][1], shapes["weight_scale"][0]
        count = scales[1] if len(scales) > 1 else 1
        mine = {
            "weight": state["weight"][:, at : at + width],
            "weight_scale": state["weight_scale"][:, scale_at : scale_at + count],
        }
        mine["weight_scale"] = mine["weight_scale"].reshape(scales)
        values.append(unpack_weight(mine, part, size))
        at, scale_at = at + width, scale_at + count
    rest, dense = values
    return joined(rest, dense, mask)


def _parts(spec: LayerSpec, columns: int, channels: int) -> list[tuple[TensorSpec, int]]:
    """Return spec and number of columns of the others, and of the salient ones."""
    assert spec.salient is not None  # asked for by the spec
    dense = spec.salient_channels * (columns // channels)
    return [(spec.weight, columns - dense), (spec.salient, dense)]
