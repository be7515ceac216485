"""Calls of a denoiser: caught as its pipeline makes them, kept as tensors, made again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dq.errors import DQError
from dq.taps import hooked

__all__ = ["Call", "captured", "flatten", "mapped", "run", "unflatten"]

Call = dict[str, Any]  # the keyword arguments of one forward call of the denoiser


@contextmanager
def captured(model: nn.Module, calls: list[Call]) -> Iterator[None]:
    """While active, append the arguments of each call of `model`: copies on the CPU, by name."""
    signature = inspect.signature(model.forward)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = signature.bind(*args, **kwargs).arguments
        calls.append({k: mapped(v, _detached) for k, v in bound.items() if k != "return_dict"})

    with hooked([model.register_forward_pre_hook(hook, with_kwargs=True)]):
        yield


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return arguments with every tensor changed.

    Args:
        value: Tensors, mappings and tuples of them, or anything else, which stays.
        change: Of each tensor.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {k: mapped(v, change) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(mapped(v, change) for v in value)
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


def run(model: nn.Module, call: Call) -> Tensor:
    """Run a denoiser on captured arguments, where it lies, and return its output."""
    # Not every denoiser has the choice: some return the tensor itself.
    plain = "return_dict" in inspect.signature(model.forward).parameters
    options = {"return_dict": False} if plain else {}
    device = next(model.parameters()).device
    output: Any = model(**mapped(call, lambda tensor: tensor.to(device)), **options)
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found
