"""The one tuning loop: learns on samples, keeps what is best on others, survives a kill."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn

from dq.calls import Call
from dq.errors import DQError
from dq.progress import track
from dq.tuning.samples import Samples
from dq.work import Work

__all__ = ["Group", "Schedule", "Tuned", "tune"]

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of Adam
_SHOWN = 20  # steps whose losses are shown as one
_CHECKS = 10  # times that the held-out loss is looked at on the way, and the state is written


@dataclass(frozen=True)
class Schedule:
    """How long, and on how much.

    Args:
        steps: Of the optimizer; the learning rate falls to zero along a cosine.
        batch: Samples of a step.
        accumulate: Parts that a step's samples are worked on in, for less memory.
        seed: Of the order of samples.
    """

    steps: int
    batch: int = 8
    accumulate: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate"):
            if getattr(self, name) < 1:
                raise DQError(f"{name} is 1 or more, not {getattr(self, name)}")
        if self.batch % self.accumulate:
            raise DQError(f"accumulate {self.accumulate} does not divide batch {self.batch}")


class Group(NamedTuple):
    """Parameters that learn alike."""

    parameters: Sequence[nn.Parameter]
    rate: float


class Tuned(NamedTuple):
    """What came of it.

    Attributes:
        start: Held-out loss before.
        best: Held-out loss of the state that was kept; `start` if no other was better.
        step: When that was.
        losses: Of all steps, `(steps,)` float32.
    """

    start: float
    best: float
    step: int
    losses: Tensor


def tune(
    groups: Sequence[Group],
    loss: Callable[[Call], Tensor],
    samples: Samples,
    held_out: Samples,
    schedule: Schedule,
    work: Work,
    stage: str,
    at: Callable[[float], None] = lambda progress: None,
) -> Tuned:
    """Learn parameters with Adam; they end in their best state, which may be the first.

    Under `accelerate launch` each process works on its share of every batch.

    Args:
        groups: What learns.
        loss: Mean loss of a batch, with gradients to the parameters.
        samples: To learn from.
        held_out: To choose by.
        schedule: How long.
        work: Where the state is kept on the way. A killed run goes on and ends in the same bits.
        stage: Name of the state.
        at: Told how far the run is, 0 to 1, before each step: for what changes on the way. States
            are chosen by what they are at 1.

    Raises:
        DQError: If the loss is not finite.
    """
    loop = _Loop(groups, loss, samples, held_out, schedule, at)
    stored = work.load(stage)
    if stored is not None:
        loop.restore(stored)
    else:
        loop.check()
    every = max(1, schedule.steps // _CHECKS)
    remaining = range(loop.step, schedule.steps)
    for step in track(remaining, f"tuning {stage}", words=loop.words):
        loop.advance()
        if (step + 1) % every == 0 or step + 1 == schedule.steps:
            loop.check()
            if loop.processes.is_main_process:
                work.save(stage, loop.state())
    loop.processes.wait_for_everyone()
    return loop.finish()


class _Loop:
    def __init__(
        self,
        groups: Sequence[Group],
        loss: Callable[[Call], Tensor],
        samples: Samples,
        held_out: Samples,
        schedule: Schedule,
        at: Callable[[float], None],
    ) -> None:
        self.processes = PartialState()
        if schedule.batch % (schedule.accumulate * self.processes.num_processes):
            raise DQError(
                f"{self.processes.num_processes} processes with {schedule.accumulate} parts each "
                f"do not divide batch {schedule.batch}"
            )
        self.parameters = [p for group in groups for p in group.parameters]
        if not self.parameters:
            raise DQError("nothing learns: no layer is chosen, and no rate is above 0")
        self.loss, self.samples, self.held_out, self.schedule = loss, samples, held_out, schedule
        self.at_progress = at
        options: list[dict[str, Any]] = [
            {"params": list(g.parameters), "lr": g.rate, "start": g.rate} for g in groups
        ]
        self.optimizer = torch.optim.Adam(options)
        self.step = 0
        self.best = [p.detach().clone() for p in self.parameters]
        self.at, self.least, self.start = 0, math.inf, math.inf
        self.losses: list[float] = []

    def advance(self) -> None:
        """Make one step of the optimizer."""
        self.at_progress(self.step / self.schedule.steps)
        rate = 0.5 * (1 + math.cos(math.pi * self.step / self.schedule.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = group["start"] * rate
        self.optimizer.zero_grad()
        rows = self._rows()[self.processes.process_index :: self.processes.num_processes]
        size = len(rows) // self.schedule.accumulate
        mean = torch.zeros((), device=self.processes.device)  # what other processes can be sent
        for start in range(0, len(rows), size):
            part = self.loss(self.samples.batch(rows[start : start + size]))
            part = part / self.schedule.accumulate
            part.backward()
            mean = mean + part.detach().float().to(mean.device)
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad = reduce(parameter.grad, "mean")
        total = float(reduce(mean, "mean"))
        if not math.isfinite(total):
            raise DQError(f"the loss is not finite in step {self.step}; lower the learning rates")
        self.optimizer.step()
        self.losses.append(total)
        self.step += 1

    def words(self) -> str:
        """Say how it stands: the loss of the last steps, and the least on the held-out samples."""
        last = self.losses[-_SHOWN:]
        return (
            f"loss {sum(last) / len(last):.3g}, held out {self.least:.3g} (first {self.start:.3g})"
        )

    def _rows(self) -> list[int]:
        """Return the samples of this step: those after the last one's, in a new order each time."""
        count, size = len(self.samples), self.schedule.batch
        rows: list[int] = []
        position = self.step * size
        while len(rows) < size:
            epoch, offset = divmod(position + len(rows), count)
            order = self.samples.shuffled(self.schedule.seed + epoch)
            rows += order[offset : offset + size - len(rows)]
        return rows

    @torch.no_grad()
    def check(self) -> None:
        """Note the held-out loss, and the state if none was better."""
        self.at_progress(1.0)
        mine = range(self.processes.process_index, len(self.held_out), self.processes.num_processes)
        size = self.schedule.batch // (self.schedule.accumulate * self.processes.num_processes)
        total = torch.zeros((), device=self.processes.device)
        for start in range(0, len(mine), size):
            rows = mine[start : start + size]
            total += len(rows) * self.loss(self.held_out.batch(rows)).float().to(total.device)
        found = float(reduce(total, "sum")) / len(self.held_out)
        if self.step == 0:
            self.start = found
        if found < self.least:
            self.at, self.least = self.step, found
            self.best = [p.detach().clone() for p in self.parameters]

    def state(self) -> dict[str, Tensor]:
        """Return everything that the rest of the run depends on."""
        values = {
            "step": torch.tensor([self.step, self.at]),
            "loss": torch.tensor([self.start, self.least], dtype=torch.float64),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
        }
        for index, (parameter, best) in enumerate(zip(self.parameters, self.best, strict=True)):
            mine = self.optimizer.state[parameter]
            values[f"{index}.now"] = parameter.detach()
            values[f"{index}.best"] = best
            for key in _MOMENTS:
                if key in mine:
                    values[f"{index}.{key}"] = mine[key]
        return values

    @torch.no_grad()
    def restore(self, stored: Mapping[str, Tensor]) -> None:
        """Invert `state`."""
        self.step, self.at = stored["step"].tolist()
        self.start, self.least = stored["loss"].tolist()
        self.losses = stored["losses"].tolist()
        for index, parameter in enumerate(self.parameters):
            parameter.copy_(stored[f"{index}.now"])
            self.best[index] = stored[f"{index}.best"].to(parameter.device)
            if f"{index}.step" in stored:
                self.optimizer.state[parameter] = {
                    key: stored[f"{index}.{key}"].to("cpu" if key == "step" else parameter.device)
                    for key in _MOMENTS
                }

    @torch.no_grad()
    def finish(self) -> Tuned:
        """Set the parameters to their best state."""
        self.at_progress(1.0)
        for parameter, best in zip(self.parameters, self.best, strict=True):
            parameter.copy_(best)
        return Tuned(self.start, self.least, self.at, torch.tensor(self.losses))
