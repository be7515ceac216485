"""Second moments of what the weights of layers meet, gathered in one pass over the calibration."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dq.calibrate import Calibration
from dq.errors import DQError, inside
from dq.nn import QuantLayer, describe
from dq.nn.changed import padded
from dq.nn.kept import others
from dq.taps import tap_inputs

__all__ = ["second_moments", "unfolded"]


def unfolded(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the rows that a layer's weight, seen as `(N, K)`, is multiplied with.

    Args:
        layer: Linear or Conv2d.
        x: What enters its product, images padded already: `(..., K)` or `(B, C, H, W)`.

    Returns:
        `(groups, R, K)`: tokens, or patches of pixels, in the order of the weight's columns.
    """
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(1, -1, x.shape[-1])
    patches = F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride)
    grouped = patches.unflatten(1, (layer.groups, -1))
    return grouped.permute(1, 0, 3, 2).flatten(1, 2)


def second_moments(
    calibration: Calibration, layers: Mapping[str, QuantLayer], rows: int
) -> dict[str, Tensor]:
    """Return E[x x^T] of the inputs of some simulated layers, quantized as the layers do it.

    Tokens that are computed apart do not enter: the rounded weight never meets them.

    Args:
        calibration: Its captured calls are replayed.
        layers: By module name.
        rows: About how many rows of each layer's input enter; taken at random from every call.

    Returns:
        `(groups, K, K)` float32 by layer; one group for all but grouped convolutions.

    Raises:
        DQError: If a layer is never reached.
    """
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)
    generator = torch.Generator().manual_seed(calibration.spec.seed)
    each = -(-rows // max(calibration.spec.n * calibration.spec.steps // calibration.spec.batch, 1))

    def seen(name: str, x: Tensor) -> None:
        layer = layers[name]
        assert isinstance(layer, nn.Module)  # QuantLayer is mixed into modules only
        if layer.spec.kept_every:
            x = others(x, layer.spec.kept_every)
        with inside(describe(name, layer)):
            x = layer.operand(x).float()
        if isinstance(layer, nn.Conv2d) and layer.transform.shift is None:
            x = padded(layer, x)  # what is shifted has been padded before
        found = unfolded(layer, x)
        picked = torch.randperm(found.shape[1], generator=generator)[:each].to(x.device)
        found = found[:, picked]
        product = found.transpose(1, 2) @ found
        sums[name] = product if name not in sums else sums[name].add_(product)
        counts[name] += found.shape[1]

    modules = {name: calibration.model.get_submodule(name) for name in layers}
    for calls in calibration.batches():
        with tap_inputs(modules, seen):
            for _ in calibration.replay(calls):
                pass
    for name in layers:
        if not counts[name]:
            raise DQError(f"{describe(name, modules[name])}: no calibration data reaches it")
    return {name: sums[name] / counts[name] for name in layers}
