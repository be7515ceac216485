"""The life cycle that all rounding methods share: which layers, on what inputs, in what order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dq.calibrate import NeedsData
from dq.errors import DQError, inside
from dq.method import Job, Method
from dq.moments import second_moments
from dq.nn import QuantLayer, describe, matrix_shape
from dq.nn.changed import conv_groups
from dq.plan import Plan, check_whole
from dq.progress import track
from dq.quantize import quantize
from dq.rounding.error import better
from dq.scales import Scales
from dq.spec import TensorSpec

__all__ = ["Rounding"]

_MOST_BYTES = 1 << 30  # of second moments held at a time


@dataclass(frozen=True)
class Rounding(Method, ABC):
    """Round weights by what they do to the outputs of their layers. Subclasses say how.

    An output channel keeps the nearest levels where these do less harm.

    Args:
        widest: Weights of more bits stay rounded to nearest.
        rows: Of inputs, tokens or patches of pixels, that a layer's second moment is made of.
    """

    widest: int = 6
    rows: int = 8192

    def __post_init__(self) -> None:
        if not 1 <= self.widest <= 8:
            raise DQError(f"widest is 1 to 8 bits, not {self.widest}")
        if self.rows < 1:
            raise DQError(f"rows is 1 or more, not {self.rows}")

    @abstractmethod
    def codes(self, weight: Tensor, scales: Scales, spec: TensorSpec, moment: Tensor) -> Tensor:
        """Return `(N, K)` uint8 codes; see `dq.rounding`."""

    def decide(self, job: Job) -> Plan:
        """Leave the plan as it is.

        Raises:
            DQError: If no weight is narrow enough to be rounded.
            NeedsData: If nothing makes the denoiser run.
        """
        self._check(job.plan)
        if job.calibration.source is None:
            raise NeedsData(
                "this recipe rounds weights by calibration data, and only the denoiser was given; "
                "use DQPipeline.from_pretrained(model, recipe=...), or a recipe that rounds to "
                "nearest, such as 'nvfp4-rtn'"
            )
        return job.plan

    def _check(self, plan: Plan) -> None:
        if all(spec.weight.grid.bits > self.widest for spec in plan.layers.values()):
            raise DQError(
                f"no weight has at most {self.widest} bits, so that the step "
                f"{type(self).__name__.lower()} would round nothing; leave it out, or set its "
                "widest to 8"
            )

    @torch.no_grad()
    def tune(self, job: Job) -> None:
        """Choose the codes of all weights, a part of the layers at a time, in the model's order."""
        mine = job.calibration.stage(type(self).__name__.lower())
        for index, layers in enumerate(self._parts(job.model)):
            stage = f"{mine}-{index:04d}"
            stored = job.calibration.work.load(stage, job.calibration.device)
            if stored is None:
                stored = self._part(job, layers)
                job.calibration.work.save(stage, stored)
            for name, layer in layers.items():
                layer.codes = stored[name]

    def _parts(self, model: nn.Module) -> Iterator[dict[str, QuantLayer]]:
        """Yield layers whose second moments fit into memory together."""
        part: dict[str, QuantLayer] = {}
        size = 0
        for name, layer in model.named_modules():
            if not isinstance(layer, QuantLayer) or layer.spec.weight.grid.bits > self.widest:
                continue
            assert isinstance(layer, (nn.Linear, nn.Conv2d))  # QuantLayer is mixed into these only
            needed = 4 * conv_groups(layer) * matrix_shape(layer)[1] ** 2
            if part and size + needed > _MOST_BYTES:
                yield part
                part, size = {}, 0
            part[name] = layer
            size += needed
        if part:
            yield part

    def _part(self, job: Job, layers: dict[str, QuantLayer]) -> dict[str, Tensor]:
        moments = second_moments(job.calibration, layers, self.rows)
        found = {}
        for name, layer in track(list(layers.items()), "rounding weights"):
            module = job.model.get_submodule(name)
            with inside(describe(name, module)):
                found[name] = self._layer(layer, moments.pop(name))
        return found

    def _layer(self, layer: QuantLayer, moments: Tensor) -> Tensor:
        check_whole(layer.spec)
        weight, scales, spec = layer.matrix(), layer.weight_quantizer.scales, layer.spec.weight
        size = len(weight) // len(moments)
        parts = []
        for index, moment in enumerate(moments):  # of each group of a convolution
            rows = slice(index * size, (index + 1) * size)
            mine = scales.rows(rows)
            nearest = quantize(weight[rows], mine, spec)
            chosen = self.codes(weight[rows], mine, spec, moment)
            parts.append(better((nearest, chosen), weight[rows], mine, spec, moment))
        return torch.cat(parts)
