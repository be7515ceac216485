"""The one training loop of all four networks: seeded, resumable, with progress."""

from __future__ import annotations

import copy
import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from dq.checkpoints.train.optimizer import MuonAdamW
from dq.checkpoints.train.progress import Progress
from dq.errors import DQError

__all__ = ["Plan", "Run", "Trainee"]


class Trainee(Protocol):
    """What one network brings to the loop."""

    name: str
    model: nn.Module

    def loss(self, generator: torch.Generator) -> Tensor:
        """Return the scalar loss of one fresh batch.

        Args:
            generator: A generator on the CPU; all chance comes from it, so that a resumed run sees
                the batches an uninterrupted one would have seen.
        """


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train: warm-up, a stable rate, then a linear decay to zero.

    The stable phase can be lengthened later, from the state that is kept just before the decay.

    Attributes:
        steps: The step to stop at, counted from the very beginning.
        lr: The learning rate of the stable phase.
        batch: Pictures a step.
        warmup: Steps of linear warm-up.
        decay: Steps of linear decay at the end; 0 for none.
        ema: The largest decay of the moving average of the weights.
        weight_decay: AdamW's decoupled weight decay.
        clip: The largest norm of the gradient.
        muon: Whether matrices are trained with Muon instead of AdamW.
        seed: Seeds the batches and the noise.
        save_minutes: Minutes between two saved states.
    """

    steps: int
    lr: float
    batch: int
    warmup: int = 200
    decay: int = 0
    ema: float = 0.9995
    weight_decay: float = 0.01
    clip: float = 1.0
    muon: bool = False
    seed: int = 0
    save_minutes: float = 3.0

    def rate(self, step: int) -> float:
        """Return the learning rate of `step`, counted from 0."""
        down = (self.steps - step) / self.decay if self.decay else 1.0
        return self.lr * min(1.0, (step + 1) / max(self.warmup, 1), down)


class Run:
    """One network in training: weights, their moving average, optimizer, generator and step.

    Args:
        trainee: The network and its loss.
        plan: How to train it.
        folder: Where `state.pt`, `stable.pt` and `log.jsonl` are kept.
    """

    def __init__(self, trainee: Trainee, plan: Plan, folder: Path) -> None:
        self.trainee, self.plan, self.folder = trainee, plan, folder
        self.ema = copy.deepcopy(trainee.model).eval().requires_grad_(False)
        self.generator = torch.Generator().manual_seed(plan.seed)
        self.step, self.seconds = 0, 0.0
        self.optimizer = self._optimizer()
        folder.mkdir(parents=True, exist_ok=True)

    def _optimizer(self) -> MuonAdamW | torch.optim.Optimizer:
        """Build what the plan asks for."""
        plan, model = self.plan, self.trainee.model
        if plan.muon:
            return MuonAdamW(model, plan.lr, plan.weight_decay)
        return torch.optim.AdamW(
            model.parameters(),
            lr=plan.lr,
            betas=(0.9, 0.99),
            weight_decay=plan.weight_decay,
            fused=True,
        )

    def save(self, name: str = "state.pt") -> None:
        """Write the whole state atomically, so that a killed process leaves the last one whole."""
        state = {
            "model": self.trainee.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "seconds": self.seconds,
        }
        partial = self.folder / f"{name}.part"
        torch.save(state, partial)
        partial.replace(self.folder / name)

    def load(self, name: str = "state.pt") -> None:
        """Continue exactly where the state `name` of the folder was written."""
        file = self.folder / name
        if not file.exists():
            raise DQError(f"{file} does not exist: nothing to continue from. Train a part first.")
        state = torch.load(file, map_location="cpu", weights_only=True)
        self.trainee.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step, self.seconds = int(state["step"]), float(state["seconds"])

    def train(self) -> None:
        """Train up to `plan.steps`; an interrupt or a termination saves the state and returns."""
        self.trainee.model.train()
        progress = Progress(self.trainee.name, self.step, self.plan.steps)
        saved = time.monotonic()
        with _stop_signals() as stop:
            while self.step < self.plan.steps and not stop:
                if self.plan.decay and self.step == self.plan.steps - self.plan.decay:
                    self.save("stable.pt")
                began = time.monotonic()
                loss = self._step()
                self.seconds += time.monotonic() - began
                if progress.update(self.step, loss):
                    self._log(progress.loss)
                if time.monotonic() - saved > 60 * self.plan.save_minutes:
                    self.save()
                    saved = time.monotonic()
        self.save()
        progress.close()

    def _step(self) -> float:
        """Make one optimizer step and return its loss."""
        rate = self.plan.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        device = next(self.trainee.model.parameters()).device
        # Twice the speed of float32 here; the weights and the optimizer stay float32.
        with torch.autocast(device.type, torch.bfloat16):
            loss = self.trainee.loss(self.generator)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trainee.model.parameters(), self.plan.clip)
        self.optimizer.step()
        self.step += 1
        self._average()
        return float(loss.detach())

    @torch.no_grad()
    def _average(self) -> None:
        """Move the average of the weights; early steps are forgotten faster."""
        keep = min(self.plan.ema, (1 + self.step) / (10 + self.step))
        average: list[Tensor] = list(self.ema.parameters())
        weights: list[Tensor] = list(self.trainee.model.parameters())
        torch._foreach_lerp_(average, weights, 1 - keep)

    def _log(self, loss: float) -> None:
        """Append one line to the log of the folder."""
        line = {
            "step": self.step,
            "loss": round(loss, 5),
            "lr": self.plan.rate(self.step - 1),
            "seconds": round(self.seconds, 1),
        }
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them, so that the step in hand is finished."""
    seen: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    old = [signal.signal(n, lambda number, frame: seen.append(number)) for n in numbers]
    try:
        yield seen
    finally:
        for number, handler in zip(numbers, old, strict=True):
            signal.signal(number, handler)
