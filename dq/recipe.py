"""The intention: what the user asked for, in a form that travels beside the weights."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Self, TypeVar, get_args, get_origin, get_type_hints

import yaml

from dq.calibrate import CalibrationSpec
from dq.errors import DQError, check_known, inside, unknown
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

        Names with "+" between them are recipes one after the other, on the calibration of the
        first: "mixdq-w4a8+paro-50".

        Raises:
            DQError: If there is none; names the nearest.
        """
        if isinstance(asked, Recipe):
            return asked
        if isinstance(asked, Mapping):
            return cls.from_dict(asked)
        if Path(asked).suffix in (".yaml", ".yml", ".json"):
            return cls.read(Path(asked))
        parts = [cls._named(name) for name in str(asked).split("+")]
        steps = tuple(step for part in parts for step in part.steps)
        return cls(str(asked), steps, parts[0].calibration)

    @staticmethod
    def is_name(text: str) -> bool:
        """Whether a text is the name of a recipe, or of several with "+" between them."""
        patterns = [template.pattern for _, template in templates.items()]
        return all(any(re.fullmatch(p, part) for p in patterns) for part in text.split("+"))

    @classmethod
    def _named(cls, name: str) -> Recipe:
        for _, template in templates.items():
            found = re.fullmatch(template.pattern, name)
            if found:
                return template.build(found)
        raise unknown("recipe", name, templates.names())

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
        steps, entries = [], values.get("steps") or ()
        if not isinstance(entries, (list, tuple)):
            raise DQError(f"steps is a list of mappings such as {{method: ptq}}, not {entries!r}")
        for index, entry in enumerate(entries):
            with inside(f"steps[{index}]"):
                if not isinstance(entry, Mapping):
                    raise DQError(f"a step is a mapping such as {{method: ptq}}, not {entry!r}")
                rest = dict(entry)
                method = methods[rest.pop("method", "")]
                steps.append(_build(method, rest))
        if not steps:
            raise DQError("the recipe has no steps; add one such as {method: ptq, weights: int4}")
        with inside("calibration"):
            calibration = _build(CalibrationSpec, values.get("calibration") or {})
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
    check_known(f"key of the {what}", values, known)


def _build(cls: type[T], values: Mapping[str, Any]) -> T:
    """Make a dataclass from JSON values; lists become tuples."""
    if not isinstance(values, Mapping):
        raise DQError(f"settings are a mapping, not {values!r}")
    fields = tuple(f.name for f in dataclasses.fields(cls))  # type: ignore[arg-type]
    _check_keys(values, fields, cls.__name__)
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    hints = get_type_hints(cls)
    for key, value in settings.items():
        if not _fits(value, hints[key]):
            plain = isinstance(hints[key], type) and not get_args(hints[key])
            wanted = hints[key].__name__ if plain else str(hints[key]).replace("tuple", "list")
            raise DQError(f"{key} takes {wanted}, not {value!r}")
    return cls(**settings)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value, lists as tuples, may stand for a field of that type."""
    if isinstance(hint, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(v, get_args(hint)[0]) for v in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
