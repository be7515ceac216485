"""The decision: for every layer that is quantized, how. Explicit, frozen, JSON."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from dq.errors import DQError, inside, unknown
from dq.spec import TensorSpec
from dq.transform import TransformSpec

__all__ = ["PLAN_VERSION", "LayerSpec", "Plan", "match"]

PLAN_VERSION = 1


def match(pattern: str, names: Iterable[str]) -> tuple[str, ...]:
    """Return the names that a shell-style pattern matches, e.g. `"*.attn2.to_[kv]"`.

    Raises:
        DQError: If it matches none; a pattern that does nothing is a mistake.
    """
    names = tuple(names)
    found = tuple(name for name in names if fnmatch.fnmatchcase(name, pattern))
    if not found:
        raise unknown("layer pattern", pattern, names[:20])
    return found


@dataclass(frozen=True)
class LayerSpec:
    """How one Linear or Conv2d is quantized.

    Args:
        weight: Spec of the weight; granularity channel or group.
        input: Spec of the input, or None if it stays floating point. Static inputs have one scale
            (granularity tensor), dynamic ones one a token, or one a group of channels.
        input_splits: Sizes of channel segments with a scale each, for inputs that are concatenated
            from parts of different range (UNet skip connections); empty for one segment.
        kept_every: The first of every so many tokens, the begin-of-sentence token of a prompt, is
            computed apart and never quantized; 0 for no such token. See `dq.nn.kept`.
        transform: How the input is changed before it is quantized, and the weight with it.
    """

    weight: TensorSpec
    input: TensorSpec | None = None
    input_splits: tuple[int, ...] = ()
    kept_every: int = 0
    transform: TransformSpec | None = None

    def __post_init__(self) -> None:
        if self.weight.dynamic or self.weight.granularity.kind not in ("channel", "group"):
            raise DQError(f"a weight is static, by channel or group, not {self.weight}")
        if self.kept_every < 0:
            raise DQError(f"kept_every is a number of tokens, not {self.kept_every}")
        if self.kept_every and not self.is_static:
            raise DQError("kept tokens need a static input: others have a scale of their own")
        if self.kept_every and self.transform is not None:
            raise DQError("a layer has kept tokens or a transform, not both")
        if self.input_splits and self.transform is not None and self.transform.rotation:
            raise DQError("a rotation would mix the channels of input_splits")
        if self.input is None:
            if self.input_splits:
                raise DQError("input_splits without a quantized input")
            return
        wanted = ("token", "group") if self.input.dynamic else ("tensor",)
        if self.input.granularity.kind not in wanted:
            kind = "dynamic" if self.input.dynamic else "static"
            raise DQError(
                f"a {kind} input has granularity {' or '.join(wanted)}, "
                f"not {self.input.granularity}"
            )
        shifted = self.transform is not None and self.transform.shift
        signed = self.input.grid.low < 0 or shifted
        if self.input.dynamic and not (self.input.symmetric and signed):
            raise DQError("a dynamic input is symmetric and signed")
        if self.input.dynamic and self.input_splits:
            raise DQError("input_splits need a static input")

    @property
    def is_static(self) -> bool:
        """Whether the input has scales that calibration must find."""
        return self.input is not None and not self.input.dynamic

    @property
    def is_deployable(self) -> bool:
        """Whether some hardware knows the formats; see `TensorSpec.is_deployable`."""
        return self.weight.is_deployable and (self.input is None or self.input.is_deployable)

    def bytes(self, rows: int, columns: int, channels: int = 0) -> int:
        """Return the bytes that a layer of N = rows and K = columns takes beside its bias.

        Args:
            rows: N.
            columns: K.
            channels: Of the input; 0 for as many as columns.
        """
        total = self.weight.bytes(rows, columns)
        if self.is_static:
            total += 8 * max(len(self.input_splits), 1)  # a scale and a zero, float32 each
        if self.kept_every:
            total += 4 * (rows + columns)  # what the kept token is, and what becomes of it
        if self.transform is not None:
            total += self.transform.bytes(channels or columns)
        return total

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        values: dict[str, Any] = {"weight": self.weight.to_dict()}
        if self.input is not None:
            values["input"] = self.input.to_dict()
        if self.input_splits:
            values["input_splits"] = list(self.input_splits)
        if self.kept_every:
            values["kept_every"] = self.kept_every
        if self.transform is not None:
            values["transform"] = dataclasses.asdict(self.transform)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Invert `to_dict`."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise unknown("key of a layer spec", key, known)
        changed = values.get("transform")
        return cls(
            weight=TensorSpec.from_dict(values.get("weight", {})),
            input=TensorSpec.from_dict(values["input"]) if "input" in values else None,
            input_splits=tuple(values.get("input_splits", ())),
            kept_every=values.get("kept_every", 0),
            transform=None if changed is None else TransformSpec.from_dict(changed),
        )

    def __str__(self) -> str:
        split = f" split {'+'.join(map(str, self.input_splits))}" if self.input_splits else ""
        kept = f" keeps 1 of {self.kept_every} tokens" if self.kept_every else ""
        changed = "" if self.transform is None else f" {self.transform}"
        return f"{self.weight} | {self.input or 'float'}{split}{kept}{changed}"


@dataclass(frozen=True)
class Plan:
    """Which layers of a denoiser are quantized, and how; others stay as they are.

    Args:
        model: Class name of the denoiser that it was made for.
        layers: Module name to spec.
        notes: Module name to one sentence, where the recipe was not followed to the letter.
        version: Of the file format.
    """

    model: str
    layers: Mapping[str, LayerSpec]
    notes: Mapping[str, str] = field(default_factory=dict)
    version: int = PLAN_VERSION

    def is_static(self) -> bool:
        """Whether any input has scales that calibration must find."""
        return any(spec.is_static for spec in self.layers.values())

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; equal specs are written once."""
        table: dict[LayerSpec, int] = {}
        layers = {name: table.setdefault(spec, len(table)) for name, spec in self.layers.items()}
        values: dict[str, Any] = {
            "version": self.version,
            "model": self.model,
            "specs": [spec.to_dict() for spec in table],
            "layers": layers,
        }
        return {**values, "notes": dict(self.notes)} if self.notes else values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Invert `to_dict`.

        Raises:
            DQError: For a newer version, unknown keys or specs that do not exist.
        """
        version = values.get("version")
        if version != PLAN_VERSION:
            raise DQError(
                f"plan version {version!r} cannot be read, only {PLAN_VERSION}; "
                "it was written by another dq: pip install -U dq-diffusion"
            )
        known = ("version", "model", "specs", "layers", "notes")
        for key in values:
            if key not in known:
                raise unknown("key of a plan", key, known)
        for key in known[:-1]:
            if key not in values:
                raise DQError(f"the plan has no {key!r}")
        specs = []
        for index, entry in enumerate(values["specs"]):
            with inside(f"specs[{index}]"):
                specs.append(LayerSpec.from_dict(entry))
        layers = {}
        for name, index in values["layers"].items():
            if not isinstance(index, int) or not 0 <= index < len(specs):
                raise DQError(f"layer {name} refers to spec {index!r} of {len(specs)}")
            layers[name] = specs[index]
        return cls(values["model"], layers, dict(values.get("notes", {})))
