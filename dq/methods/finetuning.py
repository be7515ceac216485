"""What all steps share that learn weights from full precision's answers."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dq.calibrate import Calibration
from dq.calls import Call
from dq.errors import DQError, unknown
from dq.family import Role
from dq.full_precision import as_float32, floated
from dq.method import Job, Method
from dq.nn import Quantizer, QuantLayer
from dq.nn.swap import ORIGINAL
from dq.tuning.loop import Schedule, Tuned
from dq.tuning.samples import Samples

__all__ = ["BLOCKS", "Finetuning", "layers_of", "share", "static_inputs"]

logger = logging.getLogger(__name__)

BLOCKS = (
    Role.FEED_FORWARD,
    Role.SELF_ATTENTION,
    Role.CROSS_ATTENTION,
    Role.CROSS_KV,
    Role.CONVOLUTION,
    Role.SKIP,
    Role.PROJECTION,
)
"""Roles of what is in the blocks; all else is what they begin and end with, or modulates them."""

_COMPUTE = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Finetuning(Method):
    """A step that learns; a subclass says in `learn` what and by which loss.

    Args:
        steps: Of the optimizer.
        batch: Samples of a step, an image at a timestep each.
        accumulate: Parts that a step is worked on in.
        compute: "float32" casts the model to it for the time being; "bfloat16" leaves it in its
            dtype, under autocast, for models too large for that. Noise of bfloat16 is above that of
            W4A8 on small models.
        checkpointing: Whether activations are computed again instead of kept, for less memory.
        held_out: Images by which the best state is chosen.
    """

    steps: int = 500
    batch: int = 8
    accumulate: int = 1
    compute: str = "float32"
    checkpointing: bool = False
    held_out: int = 6

    def __post_init__(self) -> None:
        if self.compute not in _COMPUTE:
            raise unknown("value of compute", self.compute, _COMPUTE)
        Schedule(self.steps, self.batch, self.accumulate)
        if self.held_out < 1:
            raise DQError(f"held_out is 1 or more images, not {self.held_out}")

    def observe(self, job: Job) -> None:
        """Draw the images to learn from, and those to choose by."""
        for calibration in (job.calibration, self.others(job)):
            for _ in calibration.batches():
                pass

    def tune(self, job: Job) -> None:
        """Learn from captured calls to do what full precision does; see `Method.tune`."""
        learns = [p for p in job.model.parameters() if p.requires_grad]
        with ExitStack() as stack:
            for parameter in learns:
                parameter.requires_grad_(False)
                stack.callback(parameter.requires_grad_, True)
            if self.compute == "float32":
                stack.enter_context(as_float32(job.model))
            if self.checkpointing:
                stack.enter_context(_checkpointing(job.model))
            self.learn(job)

    @abstractmethod
    def learn(self, job: Job) -> None:
        """Do it, on a model none of whose parameters has a gradient."""

    def report(self, job: Job, name: str, words: str, found: Tuned) -> None:
        """Say what came of it, in the log and in the notes of the plan.

        Args:
            job: Whose plan.
            name: Of the step.
            words: What has learned.
            found: What came of it.
        """
        said = (
            f"loss on held-out images {found.best:.4g}, {found.start:.4g} before; from step "
            f"{found.step} of {self.steps}"
        )
        logger.info("%s: %s", name, said)
        notes = {**job.plan.notes, name: f"{words}; {said}"}
        job.plan = dataclasses.replace(job.plan, notes=notes)

    @property
    def autocast(self) -> torch.dtype | None:
        """Dtype of products, where it is not that of the tensors."""
        return torch.bfloat16 if self.compute == "bfloat16" else None

    def schedule(self, job: Job) -> Schedule:
        """Return how long, and on how much."""
        return Schedule(self.steps, self.batch, self.accumulate, job.calibration.spec.seed)

    def samples(self, calibration: Calibration) -> Samples:
        """Return captured calls row by row."""
        calls: list[Call] = [call for batch in calibration.batches() for call in batch]
        if self.compute == "float32":
            calls = [floated(call) for call in calls]
        arguments = inspect.signature(calibration.model.forward).parameters
        return Samples(calls, noisy=next(iter(arguments)))

    def others(self, job: Job) -> Calibration:
        """Return the images to choose by."""
        own = job.calibration
        if own.source is None:
            return own  # which will say that it needs data
        return own.beside(own.source.held_out(own.spec, self.held_out))


def layers_of(job: Job, wanted: Iterable[str]) -> list[str]:
    """Return the names of the quantized layers of some roles, in the model's order.

    Raises:
        DQError: If there are none, though roles are given.
    """
    roles, wanted = job.family.roles(job.model), set(wanted)
    layers = [name for name, m in job.model.named_modules() if isinstance(m, QuantLayer)]
    chosen = [name for name in layers if roles[name] in wanted]
    if wanted and not chosen:
        there: list[Role] = sorted({roles[name] for name in layers})
        raise DQError(
            f"no quantized layer has one of the roles {', '.join(sorted(wanted))}; there are: "
            f"{', '.join(there)}"
        )
    return chosen


def static_inputs(model: nn.Module) -> list[Quantizer]:
    """Return the quantizers of inputs that have scales which can learn."""
    layers = [m for m in model.modules() if isinstance(m, QuantLayer)]
    every = [q for m in layers for q in m.input_quantizers if isinstance(q, Quantizer)]
    return [q for q in every if not q.spec.dynamic]


@contextmanager
def _checkpointing(model: Any) -> Iterator[None]:
    """Let a model compute activations again instead of keeping them, for a while."""
    if not getattr(model, "_supports_gradient_checkpointing", False):
        raise DQError(f"{type(model).__name__} has no gradient checkpointing; set it to false")
    before = model.is_gradient_checkpointing
    model.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if not before:
            model.disable_gradient_checkpointing()


def share(model: nn.Module, learned: int) -> str:
    """Say how much of a model learns, in words."""
    twice = (".latent", ORIGINAL)  # what learns, and what it began as
    parameters = model.named_parameters()
    total = sum(p.numel() for name, p in parameters if not any(part in name for part in twice))
    return f"{100 * learned / total:.1f} % of {total} weights learn"
