"""What a denoiser's config says about its quantization."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from dq.errors import DQError, check_known, inside
from dq.plan import Plan
from dq.recipe import Recipe

__all__ = ["DQConfig", "forget", "record"]

_KEYS = ("recipe", "plan", "digest", "version")


class _Method(str, Enum):  # noqa: UP042 - the loader compares with plain strings and asks for .value
    DQ = "dq"


class DQConfig(QuantizationConfigMixin):
    """What stands in a denoiser's `config.json` under `quantization_config`.

    Args:
        recipe: For float checkpoints: a data-free recipe, by name, file, dictionary or object.
        plan: For quantized ones: the plan, as an object or as JSON values.
        digest: Checksum of all packed tensors, 8 hex digits; None leaves it unchecked.
        version: Of the plan format, written beside the plan.

    Raises:
        DQError: If neither or both of recipe and plan are given, or one of them is not valid.
    """

    def __init__(
        self,
        recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
        plan: Plan | Mapping[str, Any] | None = None,
        digest: str | None = None,
        version: int | None = None,
    ) -> None:
        if (recipe is None) == (plan is None):
            raise DQError("DQConfig takes a recipe or a plan, and one of them only")
        self.quant_method = _Method.DQ
        self.recipe = None if recipe is None else Recipe.get(recipe)
        self.plan = _plan(plan, version)
        self.digest = digest

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Invert `to_dict`."""
        values = {k: v for k, v in config_dict.items() if k != "quant_method"}
        check_known("key of quantization_config", values, _KEYS)
        config = cls(**values)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        values: dict[str, Any] = {"quant_method": "dq"}
        if self.recipe is not None:
            return {**values, "recipe": self.recipe.to_dict()}
        assert self.plan is not None  # one of both is there
        plan = self.plan.to_dict()
        values |= {"version": plan.pop("version"), "plan": plan}
        return values if self.digest is None else {**values, "digest": self.digest}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the same as `to_dict`."""
        return self.to_dict()

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return `to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def __repr__(self) -> str:
        if self.recipe is not None:
            return f"DQConfig(recipe={self.recipe.name!r})"
        assert self.plan is not None  # one of both is there
        return f"DQConfig(plan of {len(self.plan.layers)} layers of {self.plan.model})"


def _plan(plan: Plan | Mapping[str, Any] | None, version: int | None) -> Plan | None:
    """Return the plan that stands in a config file, where anything may stand."""
    if plan is None or isinstance(plan, Plan):
        return plan
    with inside("quantization_config"):
        try:
            return Plan.from_dict({**plan, **({} if version is None else {"version": version})})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DQError(
                f"the plan is malformed ({error}); copy or download config.json again"
            ) from error


def record(model: Any, config: DQConfig) -> None:
    """Write down in a model's config how it is quantized."""
    model.register_to_config(quantization_config=config)


def forget(model: Any) -> None:
    """Remove every trace of quantization from a model's config; the loader itself forgets it."""
    kept = {k: v for k, v in model.config.items() if k != "quantization_config"}
    model._internal_dict = FrozenDict(kept)
