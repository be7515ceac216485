"""The intention: what the user asked for, in a form that travels beside the weights."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml

from dq.calibrate import CalibrationSpec
from dq.errors import DQError, inside, unknown
from dq.method import Method, methods
from dq.registry import Registry

__all__ = ["Recipe", "Template", "templates"]

T = TypeVar("T")


@dataclass(frozen=True)
class Recipe:
    """An ordered list of methods and what they are calibrated on.

    Args:
        name: How it is called in reports.
        steps: Methods, in the order in which they act.
        calibration: Prompts or classes, how many, steps, seed.
    """

    name: str
    steps: tuple[Method, ...]
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)

    @classmethod
    def get(cls, asked: Recipe | str | Path | Mapping[str, Any]) -> Recipe:
        """Return the recipe that is meant by a name, a `.yaml` or `.json` file, or a dictionary.

        Raises:
            DQError: If there is none; names the nearest.
        """
        if isinstance(asked, Recipe):
            return asked
        if isinstance(asked, Mapping):
            return cls.from_dict(asked)
        if Path(asked).suffix in (".yaml", ".yml", ".json"):
            return cls.read(Path(asked))
        for _, template in templates.items():
            found = re.fullmatch(template.pattern, str(asked))
            if found:
                return template.build(found)
        raise unknown("recipe", asked, templates.names())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a YAML or JSON file."""
        if not path.is_file():
            raise DQError(f"recipe file {path} does not exist")
        with inside(str(path)):
            try:
                values = yaml.safe_load(path.read_text())
            except yaml.YAMLError as error:
                raise DQError(f"not valid YAML or JSON: {error}") from error
            if not isinstance(values, Mapping):
                raise DQError("a recipe is a mapping with the keys name, steps and calibration")
            return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Invert `to_dict`.

        Raises:
            DQError: For an unknown key or value; says where.
        """
        _check_keys(values, ("name", "steps", "calibration"), "recipe")
        steps = []
        for index, entry in enumerate(values.get("steps", ())):
            with inside(f"steps[{index}]"):
                rest = dict(entry)
                method = methods[rest.pop("method", "")]
                steps.append(_build(method, rest))
        if not steps:
            raise DQError("the recipe has no steps; add one such as {method: ptq, weight_bits: 4}")
        with inside("calibration"):
            calibration = _build(CalibrationSpec, values.get("calibration", {}))
        return cls(str(values.get("name", "custom")), tuple(steps), calibration)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        names = {entry: name for name, entry in methods.items()}
        return {
            "name": self.name,
            "steps": [{"method": names[type(s)], **dataclasses.asdict(s)} for s in self.steps],
            "calibration": dataclasses.asdict(self.calibration),
        }

    def save(self, path: Path) -> None:
        """Write JSON."""
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")


@dataclass(frozen=True)
class Template:
    """A family of recipe names.

    Args:
        pattern: Regular expression that the whole name must match.
        help: One line for `dq recipes`.
        build: Makes the recipe from the match.
    """

    pattern: str
    help: str
    build: Callable[[re.Match[str]], Recipe]


templates: Registry[Template] = Registry("recipe", home="dq.methods")


def _check_keys(values: Mapping[str, Any], known: tuple[str, ...], what: str) -> None:
    for key in values:
        if key not in known:
            raise unknown(f"key of the {what}", key, known)


def _build(cls: type[T], values: Mapping[str, Any]) -> T:
    """Make a dataclass from JSON values; lists become tuples."""
    fields = tuple(f.name for f in dataclasses.fields(cls))  # type: ignore[arg-type]
    _check_keys(values, fields, cls.__name__)
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
