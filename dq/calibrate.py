"""Calibration: what really enters the denoiser, and what ranges its layers see.

Inputs are captured by a pre-hook on the denoiser while its own pipeline draws images, then
replayed: every method sees the same calls, in the same order, whatever else it does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dq.calls import Call, captured, flatten, run, unflatten
from dq.errors import DQError
from dq.full_precision import full_precision
from dq.nn import describe
from dq.nn.steps import noted
from dq.plan import LayerSpec, Plan
from dq.progress import track
from dq.ranges import InputObserver, InputRange, InputRanges
from dq.taps import tap_inputs
from dq.transform import NO_TRANSFORM, Transform
from dq.work import Work

__all__ = ["Calibration", "CalibrationSpec", "NeedsData", "Source"]


@dataclass(frozen=True)
class CalibrationSpec:
    """What calibration runs on.

    Args:
        prompts: Texts, taken in order and repeated if fewer than `n`; for class-conditional models
            class names. None takes the model's own or the built-in ones.
        n: Number of images.
        steps: Denoising steps of each.
        batch: Images drawn at a time.
        seed: Of image 0; image i has seed + i.
        folder: Of images that the denoiser is to see, with noise, instead of those that it draws
            itself; their captions are the prompts unless some are given. Empty for none.
        size: (height, width) of the images, or (frames, height, width); none for the model's own.
        first: Number of the prompt, or image of the folder, that is taken first.
    """

    prompts: tuple[str, ...] | None = None
    n: int = 16
    steps: int = 10
    batch: int = 8
    seed: int = 0
    folder: str = ""
    size: tuple[int, ...] = ()
    first: int = 0

    def __post_init__(self) -> None:
        for name in ("n", "steps", "batch"):
            if getattr(self, name) < 1:
                raise DQError(f"calibration needs {name} of 1 or more, not {getattr(self, name)}")

    @property
    def held_out_seed(self) -> int:
        """Seed of the first held-out image, farther on than any calibration draws images."""
        return self.seed + (1 << 20)


class NeedsData(DQError):
    """Raised when a recipe wants to see the denoiser run, and nothing makes it run."""


class Source(Protocol):
    """Something that makes the denoiser run: a pipeline with prompts or classes."""

    def batches(self, spec: CalibrationSpec) -> int:
        """Return how many batches there are."""

    def run(self, spec: CalibrationSpec, batch: int) -> Tensor:
        """Draw the images of one batch; the denoiser is called on the way.

        Returns:
            What was drawn, `(B, ...)`: latents, or images where the pipeline gives nothing else.
        """

    def images(self, spec: CalibrationSpec, batch: int) -> Tensor:
        """Draw one batch to the end, `(B, 3, H, W)` in [0, 1].

        Raises:
            DQError: If nothing decodes them.
        """

    def held_out(self, spec: CalibrationSpec, n: int) -> CalibrationSpec:
        """Return other prompts and seeds than those of `spec`, n of them."""

    def identity(self, spec: CalibrationSpec) -> Mapping[str, Any]:
        """Return JSON values that change with whatever reaches the denoiser."""


@dataclass
class Calibration:
    """Captured calls of one denoiser in full precision, made when first asked for.

    Args:
        model: The denoiser, float, or with simulated layers, which are taken out for the drawing.
        source: What makes it run; None if the recipe has no data.
        spec: How much.
        work: Where finished batches and stages are kept.
    """

    model: nn.Module
    source: Source | None
    spec: CalibrationSpec
    work: Work = field(default_factory=lambda: Work(None))
    _stages: Counter[str] = field(default_factory=Counter, init=False)  # of each kind so far

    def stage(self, kind: str) -> str:
        """Return a name for the next stage of a kind: those of a recipe's steps must not mix."""
        number = self._stages[kind]
        self._stages[kind] += 1
        return f"{kind}-{number}"

    def beside(self, spec: CalibrationSpec) -> Calibration:
        """Return a calibration of the same model on other images, kept in a folder of its own."""
        folder = self.work.folder
        name = f"images-{spec.seed}-{spec.n}-{spec.steps}"
        return Calibration(
            self.model, self.source, spec, Work(None if folder is None else folder / name)
        )

    def batches(self) -> Iterator[list[Call]]:
        """Yield the calls of each batch of images, capturing what was not captured before.

        Raises:
            NeedsData: If there is no source.
        """
        if self.source is None:
            raise NeedsData(
                "this recipe needs calibration data, and only the denoiser was given; use "
                "DQPipeline.from_pretrained(model, recipe=...), or a recipe with dynamic inputs "
                "such as 'w8a8-dynamic'"
            )
        for batch in track(range(self.source.batches(self.spec)), "calibrating"):
            yield self._batch(self.source, batch)

    def _batch(self, source: Source, batch: int) -> list[Call]:
        stage = f"calls-{batch:04d}"
        stored = self.work.load(stage)
        if stored is None:
            calls: list[Call] = []
            with full_precision(self.model), captured(self.model, calls):
                source.run(self.spec, batch)
            if not calls:
                raise DQError("the pipeline drew images without calling its denoiser")
            stored = {
                f"{index:04d}.{key}": value
                for index, call in enumerate(calls)
                for key, value in flatten(call).items()
            }
            self.work.save(stage, stored)
        return [call for _, call in sorted(unflatten(stored).items())]

    @torch.no_grad()
    def replay(self, calls: Sequence[Call]) -> Iterator[Any]:
        """Run the denoiser on captured calls again and yield its outputs."""
        for call in calls:
            yield run(self.model, call)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.model.parameters()).device

    def input_ranges(
        self, plan: Plan, transforms: Mapping[str, Transform] = MappingProxyType({})
    ) -> InputRanges:
        """Return the range of each segment of each static input of the plan.

        Args:
            plan: What is wanted.
            transforms: By layer, where inputs are changed before they are quantized.

        Raises:
            DQError: If a layer sees values that are not finite, or is never reached.
        """
        return self.ranges_of([plan], transforms)[0]

    def ranges_of(
        self, plans: Sequence[Plan], transforms: Mapping[str, Transform] = MappingProxyType({})
    ) -> list[InputRanges]:
        """Return the input ranges of several plans, observed in one pass."""
        wanted = [{n: s for n, s in plan.layers.items() if s.is_static} for plan in plans]
        if not any(wanted):
            return [{} for _ in plans]
        stage = self.stage("ranges")
        stored = self.work.load(stage, self.device)
        names = {f"{i}.{name}" for i, specs in enumerate(wanted) for name in specs}
        if stored is None or {n.rpartition(".")[0] for n in stored} != names:
            stored = self._observe(wanted, transforms)
            self.work.save(stage, stored)
        return [
            {
                name: InputRange(*(stored.get(f"{i}.{name}.{k}") for k in InputRange._fields))  # type: ignore[arg-type]
                for name in specs
            }
            for i, specs in enumerate(wanted)
        ]

    def _observe(
        self, wanted: Sequence[Mapping[str, LayerSpec]], transforms: Mapping[str, Transform]
    ) -> dict[str, Tensor]:
        layers = {name: self.model.get_submodule(name) for specs in wanted for name in specs}
        watchers: dict[str, dict[int, InputObserver]] = {name: {} for name in layers}
        for index, specs in enumerate(wanted):
            for name, spec in specs.items():
                place = describe(name, layers[name])
                changed = transforms.get(name, NO_TRANSFORM)
                watchers[name][index] = InputObserver(place, layers[name], spec, changed)
        every = [watcher for mine in watchers.values() for watcher in mine.values()]

        def seen(name: str, x: Tensor) -> None:
            for watcher in watchers[name].values():
                watcher.update(x)

        with ExitStack() as stack:
            if any(watcher.groups for watcher in every):
                steps = stack.enter_context(noted(self.model))
                for watcher in every:
                    watcher.steps = steps
            for calls in self.batches():
                # During the replay only: a batch being drawn would count twice, a stored one once.
                with tap_inputs(layers, seen):
                    for _ in self.replay(calls):
                        pass
        return {
            f"{index}.{name}.{key}": value
            for name, mine in watchers.items()
            for index, watcher in mine.items()
            for key, value in watcher.range()._asdict().items()
            if value is not None
        }
