"""What enters the layers of a float model: ranges of channels, and samples to try things on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dq.calibrate import Calibration
from dq.errors import DQError
from dq.nn import describe
from dq.taps import tap_inputs

__all__ = ["ChannelRange", "Seen", "look"]

_STORED = ("ends", "samples", "by_step")  # of each layer


class ChannelRange(NamedTuple):
    """The smallest and largest values of each input channel, `(C,)` float32."""

    low: Tensor
    high: Tensor


class Seen(NamedTuple):
    """What is known of the input of a layer.

    The last batch of the calibration is held out: what was chosen by the others is tried on it.

    Attributes:
        range: Over all batches.
        early: Over all batches but the last; over all if there is one only.
        samples: A few inputs from the last batch, `(tokens, C)` or `(images, C, H, W)`, on the CPU.
        by_step: `(T, C)` float32, the largest magnitude of each channel at each denoising step,
            over all batches: T is the number of calls of a batch, and the k-th call of every batch
            is the same step. Zero at calls that do not reach the layer.
    """

    range: ChannelRange
    early: ChannelRange
    samples: Tensor
    by_step: Tensor


def look(
    calibration: Calibration, names: Iterable[str], tokens: int = 512, images: int = 8
) -> dict[str, Seen]:
    """Look at what enters some layers of a float model, in one pass over the calibration.

    Args:
        calibration: Its captured calls are replayed.
        names: Modules of Linear and Conv2d layers.
        tokens: Samples of a Linear, about.
        images: Samples of a Conv2d, about.

    Raises:
        DQError: If a layer sees values that are not finite, or is never reached.
    """
    layers = {name: calibration.model.get_submodule(name) for name in names}
    stage = calibration.stage("inputs")
    stored = calibration.work.load(stage, calibration.device)
    if stored is None or stored.keys() != {f"{n}.{key}" for n in layers for key in _STORED}:
        stored = _look(calibration, layers, tokens, images)
        calibration.work.save(stage, stored)
    return {name: _seen(name, stored) for name in layers}


def _look(
    calibration: Calibration, layers: Mapping[str, nn.Module], tokens: int, images: int
) -> dict[str, Tensor]:
    ranges: dict[str, list[ChannelRange]] = {name: [] for name in layers}
    sizes: dict[str, dict[int, Tensor]] = {name: {} for name in layers}  # by step
    steps = 0
    parts: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(calibration.spec.seed)
    for calls in calibration.batches():
        now: dict[str, ChannelRange] = {}
        steps = max(steps, len(calls))
        parts = {name: [] for name in layers}  # those of the last batch stay

        def seen(
            step: int,
            name: str,
            x: Tensor,
            now: dict[str, ChannelRange] = now,
            parts: dict[str, list[Tensor]] = parts,
            calls: int = len(calls),
        ) -> None:
            low, high = torch.aminmax(_by_channel(layers[name], x).float(), dim=0)
            size = torch.maximum(-low, high)
            sizes[name][step] = torch.maximum(size, sizes[name].get(step, size))
            if name in now:
                low, high = torch.minimum(low, now[name].low), torch.maximum(high, now[name].high)
            now[name] = ChannelRange(low, high)
            is_image = isinstance(layers[name], nn.Conv2d)
            rows = x if is_image else x.reshape(-1, x.shape[-1])
            count = -(-(images if is_image else tokens) // calls)
            picked = torch.randperm(len(rows), generator=generator)[:count].to(x.device)
            parts[name].append(rows[picked].cpu())

        for step, call in enumerate(calls):
            with tap_inputs(layers, partial(seen, step)):
                for _ in calibration.replay([call]):
                    pass
        for name, found in now.items():
            ranges[name].append(found)
    stored: dict[str, Tensor] = {}
    for name, layer in layers.items():
        place = describe(name, layer)
        if not ranges[name] or not parts[name]:
            raise DQError(f"{place}: no calibration data reaches it")
        ends = torch.stack([torch.stack(found) for found in ranges[name]])
        if not bool(ends.isfinite().all()):
            raise DQError(f"{place}: its input is not finite during calibration")
        zero = torch.zeros_like(ends[0, 0])
        stored[f"{name}.ends"] = ends  # (batches, 2, C)
        stored[f"{name}.by_step"] = torch.stack([sizes[name].get(i, zero) for i in range(steps)])
        stored[f"{name}.samples"] = torch.cat(parts[name])
    return stored


def _seen(name: str, stored: Mapping[str, Tensor]) -> Seen:
    low, high = stored[f"{name}.ends"].unbind(1)
    early = slice(0, max(len(low) - 1, 1))
    return Seen(
        ChannelRange(low.amin(0), high.amax(0)),
        ChannelRange(low[early].amin(0), high[early].amax(0)),
        stored[f"{name}.samples"].cpu(),
        stored[f"{name}.by_step"],
    )


def _by_channel(layer: nn.Module, x: Tensor) -> Tensor:
    """Return an input as `(n, C)`."""
    channels = x.movedim(1, -1) if isinstance(layer, nn.Conv2d) else x
    return channels.reshape(-1, channels.shape[-1])
