"""What becomes of the layers that see the timestep (QuEST, Wang et al. 2024, arXiv 2402.03666).

They are few and small, and an error there is one of every pixel: table 2 of the paper has what
protecting them gains. Learning them is a part of `dq.methods.quest`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from dq.calibrate import Calibration
from dq.calls import Call
from dq.errors import DQError, unknown
from dq.family import Role
from dq.method import Job, Method, methods
from dq.methods.step_groups import captured_times
from dq.nn import QuantLayer
from dq.plan import Plan
from dq.tuning.timed import outputs_over_time

__all__ = ["Temporal"]

_TREATMENTS = ("keep", "cache")


@methods.register("temporal")
@dataclass(frozen=True)
class Temporal(Method):
    """Protect the layers of time; comes after the step that decides formats.

    Args:
        treatment: "keep" leaves them in floating point. "cache" stores what those put out that see
            nothing but the timestep, in full precision, for the timesteps of a schedule, and these
            are not computed there; at other timesteps they compute as the steps before have
            decided, and so do always those that see more.
        schedules: Numbers of denoising steps whose timesteps are stored; empty for that of the
            calibration.
    """

    treatment: str = "keep"
    schedules: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.treatment not in _TREATMENTS:
            raise unknown("value of treatment", self.treatment, _TREATMENTS)
        if any(steps < 1 for steps in self.schedules):
            raise DQError(f"schedules are numbers of denoising steps, not {self.schedules}")
        if self.schedules and self.treatment != "cache":
            raise DQError("schedules are for the treatment cache")

    def decide(self, job: Job) -> Plan:
        """Take layers out of the plan, or mark them; see `Method.decide`.

        Raises:
            DQError: If there is nothing to store.
            NeedsData: If outputs are to be stored and nothing makes the denoiser run.
        """
        return self._kept(job) if self.treatment == "keep" else self._cached(job)

    def _kept(self, job: Job) -> Plan:
        roles = job.family.roles(job.model)
        time = [name for name in job.plan.layers if roles[name] is Role.TIME]
        layers = {name: spec for name, spec in job.plan.layers.items() if name not in time}
        notes = dict.fromkeys(time, "stays float: layers of time are kept")
        return dataclasses.replace(job.plan, layers=layers, notes={**job.plan.notes, **notes})

    def _cached(self, job: Job) -> Plan:
        time = [name for name in job.family.timed(job.model) if name in job.plan.layers]
        if not time:
            raise DQError(
                f"no quantized layer of this {type(job.model).__name__} sees nothing but the "
                "timestep: there is nothing to cache; keep the layers of time instead"
            )
        found = (captured_times(job.model, each) for each in self._drawn(job))
        times = tuple(sorted(set(itertools.chain.from_iterable(found))))
        marked = {n: dataclasses.replace(job.plan.layers[n], tabled=times) for n in time}
        return dataclasses.replace(job.plan, layers={**job.plan.layers, **marked})

    def _drawn(self, job: Job) -> Iterator[Calibration]:
        """Yield what draws one image for each number of steps."""
        own = job.calibration
        for steps in self.schedules or (own.spec.steps,):
            yield own.beside(dataclasses.replace(own.spec, n=1, batch=1, steps=steps))

    def tune(self, job: Job) -> None:
        """Fill the tables; see `Method.tune`."""
        tabled = {name: spec.tabled for name, spec in job.plan.layers.items() if spec.tabled}
        if not tabled:
            return
        times = next(iter(tabled.values()))
        for name, table in outputs_over_time(job.model, tabled, times, self._calls(job)).items():
            layer = job.model.get_submodule(name)
            assert isinstance(layer, QuantLayer)  # the plan names them
            layer.table = table

    def _calls(self, job: Job) -> Iterator[Call]:
        for each in self._drawn(job):
            for calls in each.batches():
                yield from calls
