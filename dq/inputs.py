"""What enters the layers of a float model: ranges of channels, and samples to try things on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dq.calibrate import Calibration, tap_inputs
from dq.errors import DQError
from dq.nn import describe

__all__ = ["ChannelRange", "channel_ranges", "input_samples"]


class ChannelRange(NamedTuple):
    """The smallest and largest values of each input channel, `(C,)` float32."""

    low: Tensor
    high: Tensor


def channel_ranges(calibration: Calibration, names: Iterable[str]) -> dict[str, ChannelRange]:
    """Return the ranges of the inputs of some layers, over all calls of the calibration.

    Args:
        calibration: Its captured calls are replayed.
        names: Modules of Linear and Conv2d layers.

    Raises:
        DQError: If a layer sees values that are not finite, or is never reached.
    """
    layers = {name: calibration.model.get_submodule(name) for name in names}
    stored = calibration.work.load("channels")
    if stored is None or {n.rpartition(".")[0] for n in stored} != layers.keys():
        found: dict[str, ChannelRange] = {}

        def seen(name: str, x: Tensor) -> None:
            low, high = torch.aminmax(_by_channel(layers[name], x).float(), dim=0)
            known = found.get(name)
            if known is not None:
                low, high = torch.minimum(low, known.low), torch.maximum(high, known.high)
            found[name] = ChannelRange(low, high)

        for calls in calibration.batches():
            with tap_inputs(layers, seen):
                for _ in calibration.replay(calls):
                    pass
        stored = {f"{n}.{k}": v for n, r in found.items() for k, v in r._asdict().items()}
        calibration.work.save("channels", stored)
    for name, layer in layers.items():
        if f"{name}.low" not in stored:
            raise DQError(f"{describe(name, layer)}: no calibration data reaches it")
        if not bool((stored[f"{name}.low"].isfinite() & stored[f"{name}.high"].isfinite()).all()):
            raise DQError(f"{describe(name, layer)}: its input is not finite during calibration")
    return {n: ChannelRange(stored[f"{n}.low"], stored[f"{n}.high"]) for n in layers}


def input_samples(
    calibration: Calibration, names: Iterable[str], tokens: int = 512, images: int = 8
) -> dict[str, Tensor]:
    """Return a few inputs of each layer, spread over the calls of the calibration.

    Args:
        calibration: Its captured calls are replayed.
        names: Modules of Linear and Conv2d layers.
        tokens: For a Linear.
        images: For a Conv2d.

    Returns:
        `(tokens, C)` or `(images, C, H, W)`, about as many, on the CPU, by layer.
    """
    layers = {name: calibration.model.get_submodule(name) for name in names}
    stored = calibration.work.load("samples")
    if stored is not None and stored.keys() == layers.keys():
        return stored
    spec = calibration.spec
    calls_in_all = max(spec.n * spec.steps // spec.batch, 1)
    generator = torch.Generator().manual_seed(spec.seed)
    parts: dict[str, list[Tensor]] = {name: [] for name in layers}
    turn = dict.fromkeys(layers, 0)

    def seen(name: str, x: Tensor) -> None:
        is_image = isinstance(layers[name], nn.Conv2d)
        rows = x if is_image else x.reshape(-1, x.shape[-1])
        wanted = images if is_image else tokens
        turn[name] += 1
        # So many from each call that all calls together give what is wanted.
        count = wanted * turn[name] // calls_in_all - wanted * (turn[name] - 1) // calls_in_all
        picked = torch.randperm(len(rows), generator=generator)[:count].to(x.device)
        parts[name].append(rows[picked].cpu())

    for calls in calibration.batches():
        with tap_inputs(layers, seen):
            for _ in calibration.replay(calls):
                pass
    found = {name: torch.cat(some) for name, some in parts.items() if some}
    calibration.work.save("samples", found)
    return found


def _by_channel(layer: nn.Module, x: Tensor) -> Tensor:
    """Return an input as `(n, C)`."""
    channels = x.movedim(1, -1) if isinstance(layer, nn.Conv2d) else x
    return channels.reshape(-1, channels.shape[-1])
