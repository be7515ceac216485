"""PTQD: mean and slope of the denoiser's error, taken out of its output (He et al. 2023).

arXiv 2305.10657, sections 3.2 and 3.3: the error of a quantized denoiser is partly proportional to
its output, partly a bias of channels, and the rest is noise. With k the slope of the error over the
output in full precision, and b its mean beside that, the output becomes (e' - b) / (1 + k). The
network's own output is corrected, not the combination of classifier-free guidance: what is linear
is so in both. The paper's change of the sampler's variance is left out: it is void without added
noise, and flow matching has none.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dq.calls import Call, run
from dq.errors import DQError
from dq.full_precision import full_precision
from dq.method import Job, Method, methods
from dq.methods.step_groups import captured_times, centres
from dq.nn import QuantLayer
from dq.plan import LayerSpec, Plan
from dq.spec import Granularity, TensorSpec
from dq.taps import tap_outputs

__all__ = ["PTQD", "Moments", "correction"]


class Moments(NamedTuple):
    """Means of the output e in full precision, of the quantized q, and of products.

    Each is `(N,)` float64.
    """

    full: Tensor
    quantized: Tensor
    full_square: Tensor
    quantized_square: Tensor
    product: Tensor

    @classmethod
    def of(cls, full: Tensor, quantized: Tensor, axis: int) -> Moments:
        """Take them from two outputs of the same shape.

        Args:
            full: `(B, ..., N)` or `(B, N, ...)`.
            quantized: Likewise.
            axis: Of the channels N.
        """
        e, q = (t.movedim(axis, -1).flatten(0, -2).double() for t in (full, quantized))
        return cls(*(x.mean(0).cpu() for x in (e, q, e * e, q * q, e * q)))

    @classmethod
    def mean(cls, some: list[Moments]) -> Moments:
        """Return the means over outputs of equal size."""
        return cls(*(torch.stack(each).mean(0) for each in zip(*some, strict=True)))

    def error(self, gain: Tensor, shift: Tensor) -> float:
        """Return the mean squared error of `gain * q + shift`."""
        e, q, ee, qq, eq = self
        terms = gain**2 * qq + shift**2 + ee + 2 * gain * shift * q - 2 * gain * eq - 2 * shift * e
        return float(terms.mean())


def correction(moments: Moments) -> tuple[Tensor, Tensor]:
    """Return gain and shift of the quantized output, `(N,)` float64 each.

    The slope k is one for all channels, and negative ones count as none, as in the paper.
    """
    e, q, ee, _, eq = moments
    covariance = (eq - e * q) - (ee - e * e)  # of the error q - e with e
    variance = (ee - e * e).sum().clamp_min(1e-30)
    slope = (covariance.sum() / variance).clamp_min(0.0)
    bias = (q - e) - slope * e
    gain = torch.ones_like(e) / (1 + slope)
    return gain, -bias * gain


@methods.register("ptqd")
@dataclass(frozen=True)
class PTQD(Method):
    """Correct the output of the denoiser; the last step of a recipe.

    A correction that does not hold on the last batch of the calibration is not made.

    Args:
        groups: Of denoising steps, with a correction each.
    """

    groups: int = 4

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise DQError(f"groups is 1 or more, not {self.groups}")

    def decide(self, job: Job) -> Plan:
        """Mark the last layer; see `Method.decide`.

        One that has stayed in floating point gets 8-bit weights, to have a place for it.

        Raises:
            DQError: If the denoiser has no single last layer, or is not told the timestep.
            NeedsData: If nothing makes the denoiser run.
        """
        name = job.family.output(job.model)
        if not name:
            kind = type(job.model).__name__
            raise DQError(
                f"ptqd: the output of {kind} is not that of one layer; leave the step out"
            )
        found = centres(captured_times(job.model, job.calibration), self.groups)
        plan, known = job.plan, job.plan.layers.get(name)
        if known is None:
            known = LayerSpec(TensorSpec("int8", Granularity("channel"), observer="mse"))
            notes = {**plan.notes, name: "has 8-bit weights: it carries the correction of ptqd"}
            plan = dataclasses.replace(plan, notes=notes)
        spec = dataclasses.replace(known, output_groups=found)
        return dataclasses.replace(plan, layers={**plan.layers, name: spec})

    @torch.no_grad()
    def tune(self, job: Job) -> None:
        """Measure the error, and choose; see `Method.tune`."""
        name = job.family.output(job.model)
        layer = job.model.get_submodule(name)
        assert isinstance(layer, QuantLayer)  # `decide` has marked it
        groups = layer.spec.output_groups
        early: dict[int, list[Moments]] = {index: [] for index in range(len(groups))}
        late: dict[int, list[Moments]] = {index: [] for index in range(len(groups))}
        batches = list(job.calibration.batches())
        for number, calls in enumerate(batches):
            last = number == len(batches) - 1
            for call in calls:
                found = self._outputs(job, name, call, layer.axis)
                assert layer.steps is not None  # given when its spec got its groups
                index = layer.steps.nearest(groups)
                assert isinstance(index, int)  # a pipeline's rows are at one timestep
                (late if last else early)[index].append(found)
        rows = []
        for index in range(len(groups)):
            fitted = correction(Moments.mean(early[index] or late[index]))
            nothing = torch.ones_like(fitted[0]), torch.zeros_like(fitted[1])
            tried = Moments.mean(late[index] or early[index])
            better = tried.error(*fitted) < tried.error(*nothing)
            rows.append(torch.stack(fitted if better else nothing))
        layer.output_affine = torch.stack(rows).float().to(layer.weight.device)

    def _outputs(self, job: Job, name: str, call: Call, axis: int) -> Moments:
        seen: list[Tensor] = []
        for place in (full_precision(job.model), nullcontext()):
            with place:
                module = {name: job.model.get_submodule(name)}
                with tap_outputs(module, lambda _, y: seen.append(y)):
                    run(job.model, call)
        full, quantized = seen
        return Moments.of(full, quantized, axis)
