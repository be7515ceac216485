"""`DQPipeline`: a diffusers pipeline that can be quantized, and says what it became."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from dq import runtime
from dq.calibrate import NeedsData
from dq.engine import decide, quantize
from dq.errors import DQError, inside
from dq.integration import DQConfig, DQQuantizer, attach
from dq.nn import keep_int8, packed_layers
from dq.pipelines.draw import PipelineSource
from dq.pipelines.footprint import Footprint, footprint
from dq.pipelines.loading import (
    HUB,
    denoiser_name,
    files_named,
    index_of,
    load_denoiser,
    resolve,
    skeleton,
)
from dq.plan import Plan
from dq.recipe import Recipe

__all__ = ["RECIPE_FILE", "DQPipeline"]

RECIPE_FILE = "dq_recipe.json"
_PROMPTS_FILE = "prompts.txt"


class DQPipeline:
    """Mixed into a checkpoint's own pipeline class by `from_pretrained`.

    The object that comes back is both a `DQPipeline` and, say, a `StableDiffusionPipeline`; it
    calls, moves, compiles and saves as that does.
    """

    _recipe: Recipe | Mapping[str, Any] | None = None  # values as stored, until they are asked for
    # What diffusers' own save drops: DiT's id2label.
    _lost: Mapping[str, Any] = MappingProxyType({})
    dq_prompts: tuple[str, ...] = ()

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
        *,
        component: str | None = None,
        work_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a pipeline, and quantize its denoiser if a recipe is given.

        Recipes that need no data pack each weight as it is read: the float model never exists.
        Others calibrate on the loaded pipeline.

        Args:
            model: Folder or hub name of a diffusers pipeline, or a checkpoint of dq, "emoji-unet".
            recipe: Name ("w4a8"), file, dictionary or object; None loads as it is.
            component: Name of the denoiser, if the pipeline has several.
            work_dir: Folder for finished stages; an interrupted calibration continues there.
            **kwargs: For `DiffusionPipeline.from_pretrained`, e.g. `variant`, or `dtype`, which is
                float32 for all components if it is not given.

        Returns:
            The pipeline, of its own class and of this one.

        Raises:
            DQError: For unknown recipes, components and families, or models quantized already.
        """
        path = resolve(model)
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            # Text encoders would come as they are stored, the others as float32: they do not fit.
            kwargs["dtype"] = torch.float32
        wanted = None if recipe is None else Recipe.get(recipe)
        index = index_of(path, {k: kwargs[k] for k in HUB if k in kwargs})
        loaded: dict[str, Any] = {}
        plan = None
        if wanted is not None:
            name, empty = skeleton(path, component, kwargs)
            # A denoiser that the caller has brought along is quantized in place, not loaded anew.
            plan = _data_free(empty, wanted) if name not in kwargs else None
            if plan is not None:
                asked = {**kwargs, "quantization_config": DQConfig(plan=plan)}
                with files_named(path):
                    _, loaded[name] = load_denoiser(path, name, **asked)
        with files_named(path):
            pipe = _adopt(DiffusionPipeline.from_pretrained(path, **{**kwargs, **loaded}))
        pipe._recipe = _stored_recipe(path) if wanted is None else wanted
        pipe.dq_prompts = _stored_prompts(path)
        pipe._lost = {k: v for k, v in index.items() if k not in pipe.config and k[0] != "_"}
        if wanted is not None and plan is None:
            pipe.quantize(wanted, component=component, work_dir=work_dir)
        return pipe

    def quantize(
        self,
        recipe: Recipe | str | Path | Mapping[str, Any],
        *,
        component: str | None = None,
        work_dir: str | os.PathLike[str] | None = None,
    ) -> Plan:
        """Quantize the denoiser in place.

        Args:
            recipe: Name, file, dictionary or object.
            component: Name of the denoiser, if the pipeline has several.
            work_dir: Folder for finished stages.

        Returns:
            The plan. If anything fails the pipeline is left as it was.
        """
        wanted = Recipe.get(recipe)
        name = denoiser_name({k: type(v).__name__ for k, v in self.components.items()}, component)  # type: ignore[attr-defined]
        work = None if work_dir is None else Path(work_dir)
        model = getattr(self, name)
        plan = quantize(model, wanted, PipelineSource(self), work)
        attach(model, plan)
        self._recipe = wanted
        return plan

    @property
    def denoiser(self) -> nn.Module:
        """The UNet or transformer."""
        classes = {k: type(v).__name__ for k, v in self.components.items()}  # type: ignore[attr-defined]
        model: nn.Module = getattr(self, denoiser_name(classes, None))
        return model

    @property
    def plan(self) -> Plan | None:
        """The plan that the denoiser was packed by, or None if it is not quantized."""
        # Not from the config: saving turns the entry there into plain JSON values.
        quantizer = getattr(self.denoiser, "hf_quantizer", None)
        return quantizer.plan if isinstance(quantizer, DQQuantizer) else None

    @property
    def recipe(self) -> Recipe | None:
        """The recipe that the plan came from, if it is known.

        Raises:
            DQError: If it was stored with a method that is not installed here; the packed model
                runs all the same.
        """
        return None if self._recipe is None else Recipe.get(self._recipe)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move to a device, as diffusers' own `to`.

        Raises:
            DQError: If a dtype is asked for and a component is packed. diffusers raises too, but
                after it has cast the components before that one.
        """
        asked = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)]
        for name, component in self.components.items():  # type: ignore[attr-defined]
            if asked and isinstance(component, nn.Module) and packed_layers(component):
                raise DQError(
                    f"{name} is packed and cannot be cast to {asked[0]}; nothing was cast. Load it "
                    "in that dtype: DQPipeline.from_pretrained(..., dtype=...)"
                )
        return super().to(*args, **kwargs)  # type: ignore[misc]

    def keep_int8(self, keep: bool) -> None:
        """Trade memory for speed on a CPU; see `dq.nn.keep_int8`.

        Args:
            keep: Whether weights may lie beside their codes as int8, a byte each. By default those
                of 8 bits do, and shorter ones are expanded at every call.
        """
        keep_int8(self.denoiser, keep)

    def remember_prompts(self, yes: bool) -> None:
        """Compute k and v of a prompt once a generation (the default), or at every step.

        Args:
            yes: Whether; the images are the same.
        """
        runtime.remember_prompts(self.denoiser, yes)

    def compile_blocks(self, **options: Any) -> int:
        """Compile the denoiser's blocks one by one; see `dq.runtime.compile_blocks`.

        Args:
            **options: For `torch.compile`.

        Returns:
            Number of compiled blocks.
        """
        return runtime.compile_blocks(self.denoiser, **options)

    def footprint(self) -> Footprint:
        """Count the bytes and bits of the denoiser."""
        return footprint(self.denoiser)

    def summary(self) -> str:
        """Say in a few lines what the denoiser weighs and what it really computes."""
        count = self.footprint()
        lines = [
            f"{count.model}: {count.parameters / 1e6:.1f} M parameters, "
            f"{len(count.layers)} layers packed",
            f"  size     {count.stored_bytes / 1e6:.2f} MB, "
            f"float {count.float_bytes / 1e6:.2f} MB; "
            f"in memory now {count.resident_bytes / 1e6:.2f} MB"
            f" and {count.scratch_bytes / 1e6:.2f} MB of scratch",
            f"  bits     {count.average_weight_bits:.2f} a weight, scales included",
        ]
        for path, (layers, weights) in count.paths().items():
            lines.append(f"  compute  {path}: {layers} layers, {weights / 1e6:.1f} M weights")
        lines += [f"  compute  {report}" for report in count.attention]
        for name, note in (self.plan.notes if self.plan else {}).items():
            lines.append(f"  note     {name}: {note}")
        return "\n".join(lines)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write an ordinary diffusers folder, with the recipe and the prompts beside it.

        Args:
            save_directory: Where.
            **kwargs: For diffusers' own `save_pretrained`.
        """
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        folder = Path(save_directory)
        if self._lost:
            file = folder / "model_index.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), **self._lost}, indent=2))
        if self._recipe is not None and self.plan is not None:
            stored = self._recipe
            values = stored.to_dict() if isinstance(stored, Recipe) else dict(stored)
            (folder / RECIPE_FILE).write_text(json.dumps(values, indent=2) + "\n")
        if self.dq_prompts:
            (folder / _PROMPTS_FILE).write_text("\n".join(self.dq_prompts) + "\n")


def _adopt(pipe: Any) -> Any:
    """Give a pipeline the class that mixes DQPipeline into its own."""
    base = type(pipe)
    pipe.__class__ = type(base.__name__, (DQPipeline, base), {"__module__": base.__module__})
    return pipe


def _data_free(skeleton: nn.Module, recipe: Recipe) -> Plan | None:
    """Return the plan of a recipe that needs no data, or None."""
    try:
        plan = decide(skeleton, recipe)
    except NeedsData:
        return None
    return None if plan.is_static() else plan


def _stored_recipe(path: str) -> Mapping[str, Any] | None:
    file = Path(path) / RECIPE_FILE
    if not file.is_file():
        return None
    with inside(str(file)):
        try:
            values: Mapping[str, Any] = json.loads(file.read_text())
        except ValueError as error:
            raise DQError(f"not valid JSON ({error}); delete it, the plan is enough") from error
    return values


def _stored_prompts(path: str) -> tuple[str, ...]:
    file = Path(path) / _PROMPTS_FILE
    return tuple(file.read_text().splitlines()) if file.is_file() else ()
