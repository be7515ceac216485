"""Hadamard rotation of groups of channels: outliers are spread over their neighbours.

For 4-bit integers (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456; in groups before each layer as
ConvRot does, arXiv 2512.03673). Formats with a scale for every few numbers gain nothing by it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from dq.errors import DQError
from dq.family import quantizable
from dq.method import Job, methods
from dq.methods.changes import Change
from dq.nn.changed import conv_groups
from dq.nn.layers import input_channels
from dq.plan import Plan
from dq.transform import NO_TRANSFORM

__all__ = ["Hadamard"]

_LEAST = 8  # channels: less would hardly spread anything


@methods.register("hadamard")
@dataclass(frozen=True)
class Hadamard(Change):
    """Rotate inputs and weights; needs no data.

    Args:
        size: Largest block, a power of two; layers have the largest that divides their channels.
    """

    size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < _LEAST or self.size & (self.size - 1):
            raise DQError(f"size is a power of two from {_LEAST} up, not {self.size}")

    def decide(self, job: Job) -> Plan:
        """Rotate whatever blocks fit; see `Method.decide`."""
        layers, specs = quantizable(job.model), dict(job.plan.layers)
        for group in self._groups(job):
            for name in group:
                channels = input_channels(layers[name]) // conv_groups(layers[name])
                rotation = min(self.size, channels & -channels)  # its largest power of two
                if rotation < _LEAST or specs[name].input_splits:
                    continue
                before = job.transforms.get(name, NO_TRANSFORM)
                self._set(job, specs, name, before._replace(rotation=rotation))
        return dataclasses.replace(job.plan, layers=specs)
