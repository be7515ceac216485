"""Calibration: what really enters the denoiser, and what ranges its layers see.

Inputs are captured by a pre-hook on the denoiser while its own pipeline draws images, then
replayed: every method sees the same calls, in the same order, whatever else it does.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dq.errors import DQError
from dq.full_precision import full_precision
from dq.nn import describe
from dq.nn.steps import noted
from dq.plan import LayerSpec, Plan
from dq.progress import track
from dq.ranges import InputObserver, InputRange, InputRanges
from dq.transform import NO_TRANSFORM, Transform
from dq.work import Work

__all__ = [
    "Calibration",
    "CalibrationSpec",
    "Call",
    "NeedsData",
    "Source",
    "flatten",
    "run",
    "tap_inputs",
    "tap_outputs",
    "unflatten",
]

Call = dict[str, Any]  # the keyword arguments of one forward call of the denoiser


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


@contextmanager
def tap_inputs(
    layers: Mapping[str, nn.Module], seen: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """While active, call `seen(name, input)` at each forward call of the named layers."""

    def hook(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        seen(name, args[0].detach())

    with _removed([m.register_forward_pre_hook(partial(hook, n)) for n, m in layers.items()]):
        yield


@contextmanager
def tap_outputs(
    layers: Mapping[str, nn.Module], seen: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """While active, call `seen(name, output)` at each forward call of the named layers."""

    def hook(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen(name, output)

    with _removed([m.register_forward_hook(partial(hook, n)) for n, m in layers.items()]):
        yield


@contextmanager
def _removed(hooks: Sequence[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end."""
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


@contextmanager
def _captured(model: nn.Module, calls: list[Call]) -> Iterator[None]:
    """While active, append the arguments of each call of `model`, bound to their names."""
    signature = inspect.signature(model.forward)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = signature.bind(*args, **kwargs).arguments
        calls.append({k: _detached(v) for k, v in bound.items() if k != "return_dict"})

    with _removed([model.register_forward_pre_hook(hook, with_kwargs=True)]):
        yield


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {k: _detached(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_detached, value))
    return value


def flatten(call: Call) -> dict[str, Tensor]:
    """Return the tensors of a call under dotted names; what is not a tensor must be None.

    Members of a tuple are called #0, #1 and so on.
    """
    flat: dict[str, Tensor] = {}
    for key, value in call.items():
        if isinstance(value, Tensor):
            flat[key] = value
        elif isinstance(value, Mapping):
            flat |= {f"{key}.{k}": v for k, v in flatten(dict(value)).items()}
        elif isinstance(value, tuple):
            members = {f"#{index}": member for index, member in enumerate(value)}
            flat |= {f"{key}.{k}": v for k, v in flatten(members).items()}
        elif isinstance(value, (int, float)):
            flat[key] = torch.tensor(value)
        elif value is not None:
            raise DQError(
                f"argument {key!r} of the denoiser is a {type(value).__name__}: "
                "calibration can replay tensors, numbers, and dictionaries and tuples of them"
            )
    return flat


def unflatten(flat: Mapping[str, Tensor]) -> Call:
    """Invert `flatten`."""
    call: Call = {}
    for key, value in flat.items():
        *path, leaf = key.split(".")
        place = call
        for name in path:
            place = place.setdefault(name, {})
        place[leaf] = value
    return {key: _with_tuples(value) for key, value in call.items()}


def _with_tuples(value: Any) -> Any:
    """Turn dictionaries whose keys are #0, #1 and so on into tuples."""
    if not isinstance(value, dict):
        return value
    made = {key: _with_tuples(member) for key, member in value.items()}
    if not all(key.startswith("#") for key in made):
        return made
    return tuple(made[f"#{index}"] for index in range(len(made)))


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
            with full_precision(self.model), _captured(self.model, calls):
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
        return _device(self.model)

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


def run(model: nn.Module, call: Call) -> Tensor:
    """Run a denoiser on captured arguments, where it lies, and return its output."""
    # Not every denoiser has the choice: some return the tensor itself.
    plain = "return_dict" in inspect.signature(model.forward).parameters
    options = {"return_dict": False} if plain else {}
    output: Any = model(**_moved(call, _device(model)), **options)
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {k: _moved(v, device) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(_moved(v, device) for v in value)
    return value
