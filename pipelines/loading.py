"""Finding the denoiser among a pipeline's components, and loading it without the others."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from torch import nn

from dq import checkpoints, checksum
from dq.errors import DQError, unknown
from dq.family import families

__all__ = [
    "HUB", "denoiser_name", "files_named", "index_of", "load_denoiser", "resolve", "skeleton",
]  # fmt: skip

HUB = ("cache_dir", "local_files_only", "revision", "token")
_FOR_MODELS = (
    *HUB, "device_map", "dtype", "max_memory", "quantization_config", "torch_dtype",
    "use_safetensors", "variant",
)  # fmt: skip


def resolve(model: str | os.PathLike[str]) -> str:
    """Return the folder of a checkpoint that ships with dq, or `model` itself."""
    name = os.fspath(model)
    return str(checkpoints.path(name)) if name in checkpoints.names() else name


def denoiser_name(classes: Mapping[str, str], asked: str | None) -> str:
    """Return the component that a family describes.

    Raises:
        DQError: If `asked` is no component or not a denoiser, or if there is none at all.
    """
    known = {name for _, family in families.items() for name in family.classes}
    found = [name for name, kind in classes.items() if kind in known]
    if asked is not None:
        if asked not in classes:
            raise unknown("component of this pipeline", asked, classes)
        if asked not in found:
            raise DQError(
                f"component {asked!r} is a {classes[asked]}; quantizable: {', '.join(found)}"
            )
        return asked
    if not found:
        raise DQError(
            f"no component of this pipeline ({', '.join(classes.values())}) has a family; "
            f"known denoisers: {', '.join(sorted(known))}"
        )
    return found[0]


def _shipped() -> list[str]:
    names = checkpoints.names()
    return [n for n in names if (checkpoints.path(n) / "model_index.json").is_file()]


def index_of(path: str, hub: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a pipeline's model_index.json says.

    Args:
        path: Folder or hub name of the pipeline.
        hub: How to reach the hub.

    Raises:
        DQError: If there is none.
    """
    try:
        index: Mapping[str, Any] = DiffusionPipeline.load_config(path, **hub)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DQError(
            f"{path} is no pipeline that can be loaded ({reason}); wanted is a folder with a "
            f"model_index.json, a hub name, or one of {', '.join(_shipped())}"
        ) from error
    return index


def _locate(path: str, component: str | None, hub: Mapping[str, Any]) -> tuple[str, Any]:
    """Return name and class of a checkpoint's denoiser, from its model_index.json."""
    index = index_of(path, hub)
    classes = {k: v[1] for k, v in index.items() if isinstance(v, (list, tuple)) and v[1]}
    name = denoiser_name(classes, component)
    return name, getattr(diffusers, classes[name])


def skeleton(path: str, component: str | None, kwargs: Mapping[str, Any]) -> tuple[str, nn.Module]:
    """Return name and weightless form of a checkpoint's denoiser."""
    hub = {k: v for k, v in kwargs.items() if k in HUB}
    name, kind = _locate(path, component, hub)
    config = kind.load_config(path, subfolder=name, **hub)
    if config.get("quantization_config"):
        raise DQError(
            f"{path} is quantized already ({config['quantization_config'].get('quant_method')}); "
            "load it without a recipe, or start from the float checkpoint"
        )
    with init_empty_weights():
        return name, kind.from_config(config)


def load_denoiser(path: str, component: str | None, **kwargs: Any) -> tuple[str, Any]:
    """Load the denoiser of a pipeline, and nothing else.

    Args:
        path: Folder or hub name of the pipeline.
        component: Name of the denoiser; None if there is only one.
        **kwargs: For the model's `from_pretrained`; what only pipelines take is left out.

    Returns:
        Name of the component, and the model.
    """
    name, kind = _locate(path, component, {k: v for k, v in kwargs.items() if k in HUB})
    shared = {k: v for k, v in kwargs.items() if k in _FOR_MODELS}
    for key in ("dtype", "torch_dtype"):
        if isinstance(chosen := shared.get(key), Mapping):  # pipelines take one by component
            shared[key] = chosen.get(name, chosen.get("default", torch.float32))
    return name, kind.from_pretrained(path, subfolder=name, **shared)


@contextmanager
def files_named(path: str) -> Iterator[None]:
    """If loading fails and a file of the folder cannot be read, say which."""
    try:
        yield
    except Exception as error:
        for file in sorted(Path(path).rglob("*.safetensors")):
            try:
                checksum.check_readable(file)
            except DQError as cause:
                raise cause from error
        raise
