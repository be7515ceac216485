"""What a denoiser would compute on hardware that had every width: theory, not speed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dq.calls import Call, run
from dq.family import quantizable
from dq.nn import PackedLayer, matrix_shape
from dq.taps import hooked

__all__ = ["Operations", "operations"]

_WORD = 64  # width of a popcount word, by which the literature divides


@dataclass(frozen=True)
class Operations:
    """Operations of one forward call, as papers on binary networks count them.

    Linear layers and convolutions are counted; products of attention, norms and activations are
    not. A multiply-add is one operation.

    Attributes:
        macs: All multiply-adds.
        float_macs: Those that have a float operand.
        bit_operations: Sum over the others of multiply-adds x weight bits x input bits, a weight of
            several bases counting all of them.
    """

    macs: int
    float_macs: int
    bit_operations: int

    @property
    def operations(self) -> float:
        """BOPs / 64 + FLOPs, the "OPs" of BinaryDM (arXiv 2404.05662, section 4)."""
        return self.bit_operations / _WORD + self.float_macs

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**dataclasses.asdict(self), "operations": self.operations}

    def __str__(self) -> str:
        return (
            f"theoretical {self.macs / 1e9:.3f} G multiply-adds of linear layers and convolutions "
            f"(attention's products not counted), {self.float_macs / 1e9:.3f} G with a float "
            f"operand; BOPs = sum of multiply-adds x weight bits x input bits = "
            f"{self.bit_operations / 1e9:.2f} G; BOPs / 64 + float operations = "
            f"{self.operations / 1e9:.3f} G. No time follows from it: see what computes above"
        )


@torch.no_grad()
def operations(model: nn.Module, call: Call) -> Operations:
    """Count one forward call.

    Args:
        model: Float or packed; on the meta device only shapes are computed.
        call: Its arguments.
    """
    macs: dict[str, int] = {}

    def seen(name: str, layer: Any, args: Any, output: Tensor) -> None:
        macs[name] = macs.get(name, 0) + output.numel() * matrix_shape(layer)[1]

    layers = quantizable(model)
    with hooked([each.register_forward_hook(partial(seen, n)) for n, each in layers.items()]):
        run(model, call)
    exact = bits = 0
    for name, count in macs.items():
        layer = layers[name]
        spec = layer.spec if isinstance(layer, PackedLayer) else None
        if spec is None or spec.input is None:
            exact += count
        else:
            bits += count * spec.weight.code_bits * spec.input.grid.bits
    return Operations(sum(macs.values()), exact, bits)
