"""Run a model again from one of its layers on, with what came before remembered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dq.calls import run
from dq.family import quantizable
from dq.taps import hooked

__all__ = ["Prefix", "stages"]

_STAGE = 12  # layers at most in a module that is remembered as a whole: a transformer block has 10


def stages(model: nn.Module, ran: Iterable[str]) -> list[str]:
    """Return the largest modules of at most 12 layers, among those that ran.

    Args:
        model: The denoiser.
        ran: Names of modules whose forward is called.

    Returns:
        Names; none lies inside another one.
    """
    sizes = {"": 0}
    for layer in quantizable(model):
        parts = layer.split(".")
        for end in range(len(parts) + 1):
            name = ".".join(parts[:end])
            sizes[name] = sizes.get(name, 0) + 1
    callable_names = set(ran) - {""}
    found: list[str] = []
    for name, _ in model.named_modules():  # parents come before their children
        inside = any(name.startswith(f"{stage}.") for stage in found)
        if name in callable_names and sizes.get(name, 0) <= _STAGE and not inside:
            found.append(name)
    return found


class Prefix:
    """One call of a model, remembered module by module.

    Modules that had returned before a layer began need not run again when only that layer changes:
    they give back what they returned. Everything between modules, additions and concatenations,
    runs as it is written, so any model will do.

    Args:
        model: The denoiser.
        watched: Names of the modules whose outputs are remembered.
    """

    def __init__(self, model: nn.Module, watched: Iterable[str]) -> None:
        self.model = model
        self.modules = {name: model.get_submodule(name) for name in watched}
        self.began: dict[str, int] = {}  # first call of each module, on a clock of events
        self._outputs: dict[str, list[tuple[int, Any]]] = {}  # when it returned, and what
        self._clock = 0
        self._now = 0
        self._calls: dict[str, int] = {}
        self._output: Tensor | None = None

    def record(self, arguments: Mapping[str, Any]) -> Tensor:
        """Run everything and remember it.

        Args:
            arguments: Of the model's forward.

        Returns:
            The model's output.
        """
        handles = []
        for name, module in self.modules.items():
            handles.append(module.register_forward_pre_hook(partial(self._begin, name)))
            handles.append(module.register_forward_hook(partial(self._end, name)))
        with hooked(handles):
            self._output = self._run(arguments)
        return self._output

    def _begin(self, name: str, module: nn.Module, args: Any) -> None:
        self._clock += 1
        self.began.setdefault(name, self._clock)

    def _end(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self._clock += 1
        self._outputs.setdefault(name, []).append((self._clock, output))

    def _run(self, arguments: Mapping[str, Any]) -> Tensor:
        self._calls = {}
        return run(self.model, dict(arguments))

    def rerun(self, arguments: Mapping[str, Any], layer: str) -> Tensor:
        """Run what begins with `layer`; only valid within `remembered`.

        Args:
            arguments: As for `record`.
            layer: Name of a watched module.

        Returns:
            The model's output.
        """
        self._now = self.began[layer]
        return self._run(arguments)

    @contextmanager
    def remembered(self) -> Iterator[None]:
        """While active, modules give back what they returned before the layer of `rerun` began."""
        before = {name: module.__dict__.get("forward") for name, module in self.modules.items()}
        for name, module in self.modules.items():
            module.forward = partial(self._answer, name, module.forward)
        try:
            yield
        finally:
            for name, module in self.modules.items():
                del module.forward
                if before[name] is not None:  # accelerate's hooks set one of the instance's own
                    module.__dict__["forward"] = before[name]

    def _answer(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        index = self._calls.get(name, 0)
        self._calls[name] = index + 1
        outputs = self._outputs.get(name, ())
        if index < len(outputs) and outputs[index][0] < self._now:
            return outputs[index][1]
        return forward(*args, **kwargs)

    def repeats(self, arguments: Mapping[str, Any], layers: Sequence[str]) -> bool:
        """Whether what is remembered leads to the recorded output, from each of some layers on.

        Not so where a model draws random numbers, or changes in place what it was given back.
        """
        assert self._output is not None  # recorded before
        with self.remembered():
            return all(torch.equal(self.rerun(arguments, n), self._output) for n in layers)
