"""The decision: for every layer that is quantized, how. Explicit, frozen, JSON."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, TypeVar

from dq.attention_spec import AttentionSpec
from dq.errors import DQError, check_known, inside, unknown
from dq.spec import TensorSpec
from dq.transform import TransformSpec

__all__ = ["PLAN_VERSION", "LayerSpec", "Plan", "check_whole", "match"]

PLAN_VERSION = 1

T = TypeVar("T")


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
            (granularity tensor) or one a group of channels, dynamic ones one a token, or one a
            token and group of channels.
        input_splits: Sizes of channel segments with a scale each, for inputs that are concatenated
            from parts of different range (UNet skip connections); empty for one segment.
        kept_every: The first of every so many tokens, the begin-of-sentence token of a prompt, is
            computed apart and never quantized; 0 for no such token. See `dq.nn.kept`.
        transform: How the input is changed before it is quantized, and the weight with it.
        tabled: Timesteps at which the output is stored, in full precision, instead of computed: for
            layers that see nothing but the timestep. See `dq.nn.stepwise`.
        salient: Spec of the weights of those input channels that have more bits than the others;
            None if all have the same. See `dq.nn.split`.
        salient_channels: How many there are.
        output_groups: Timesteps, ascending, each with a scale and a shift of the output; a call
            takes those of the nearest. Empty for none.
    """

    weight: TensorSpec
    input: TensorSpec | None = None
    input_splits: tuple[int, ...] = ()
    kept_every: int = 0
    transform: TransformSpec | None = None
    tabled: tuple[float, ...] = ()
    output_groups: tuple[float, ...] = ()
    salient: TensorSpec | None = None
    salient_channels: int = 0

    def __post_init__(self) -> None:
        if self.weight.dynamic or self.weight.granularity.kind not in ("channel", "group"):
            raise DQError(f"a weight is static, by channel or group, not {self.weight}")
        if self.weight.step_groups:
            raise DQError("a weight is the same at every step: step groups are for inputs")
        if (self.salient is None) != (self.salient_channels == 0) or self.salient_channels < 0:
            raise DQError(f"{self.salient_channels} salient channels of {self.salient}: one alone")
        if self.salient is not None:
            kinds = {self.weight.granularity.kind, self.salient.granularity.kind}
            if kinds != {"channel"} or self.salient.dynamic:
                raise DQError("salient channels and the others have a scale an output channel")
        if self.tabled and self.output_groups:
            raise DQError("outputs that are stored need no correction: tabled or output_groups")
        if self.kept_every < 0:
            raise DQError(f"kept_every is a number of tokens, not {self.kept_every}")
        for name in ("tabled", "output_groups"):
            times = getattr(self, name)
            if list(times) != sorted(set(times)):
                raise DQError(f"{name} are ascending timesteps, not {times}")
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
        wanted = ("token", "group") if self.input.dynamic else ("tensor", "group")
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
        if self.input_splits and self.input.granularity.kind != "tensor":
            raise DQError("input_splits need a static input without groups of channels")
        if not self.input.dynamic and self.input.scale_grid is not None:
            raise DQError(f"{self.input.scale_format} scales of an input are found at run time")

    @property
    def core(self) -> LayerSpec:
        """What decides the codes of weight and input; the rest is put upon them."""
        return dataclasses.replace(self, tabled=(), output_groups=())

    @property
    def depends_on_step(self) -> bool:
        """Whether a layer has to know the timestep."""
        inputs = () if self.input is None else self.input.step_groups
        return bool(self.tabled or self.output_groups or inputs)

    @property
    def is_static(self) -> bool:
        """Whether the input has scales that calibration must find."""
        return self.input is not None and not self.input.dynamic

    @property
    def is_deployable(self) -> bool:
        """Whether some hardware knows the formats; see `TensorSpec.is_deployable`."""
        if self.salient is not None:
            return False
        return self.weight.is_deployable and (self.input is None or self.input.is_deployable)

    def bytes(self, rows: int, columns: int, channels: int = 0) -> int:
        """Return the bytes that a layer of N = rows and K = columns takes beside its bias.

        Args:
            rows: N.
            columns: K.
            channels: Of the input; 0 for as many as columns.
        """
        total = self._weight_bytes(rows, columns, channels or columns)
        if self.input is not None and self.is_static:
            parts = max(len(self.input_splits), 1)
            if self.input.granularity.kind == "group":
                parts = (channels or columns) // self.input.granularity.size
            # A scale and a zero, float32 each.
            total += 8 * parts * max(len(self.input.step_groups), 1)
        total += 4 * rows * len(self.tabled)
        total += 8 * rows * len(self.output_groups)  # a scale and a shift
        if self.kept_every:
            total += 4 * (rows + columns)  # what the kept token is, and what becomes of it
        if self.transform is not None:
            total += self.transform.bytes(channels or columns)
        return total

    def _weight_bytes(self, rows: int, columns: int, channels: int) -> int:
        if self.salient is None:
            return self.weight.bytes(rows, columns)
        dense = self.salient_channels * (columns // channels)
        both = self.weight.bytes(rows, columns - dense) + self.salient.bytes(rows, dense)
        return both + 4 * self.salient_channels  # their numbers

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        values: dict[str, Any] = {"weight": self.weight.to_dict()}
        if self.salient is not None:
            values["salient"] = self.salient.to_dict()
            values["salient_channels"] = self.salient_channels
        if self.input is not None:
            values["input"] = self.input.to_dict()
        if self.input_splits:
            values["input_splits"] = list(self.input_splits)
        if self.kept_every:
            values["kept_every"] = self.kept_every
        if self.transform is not None:
            values["transform"] = dataclasses.asdict(self.transform)
        for name in ("tabled", "output_groups"):
            if getattr(self, name):
                values[name] = list(getattr(self, name))
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Invert `to_dict`."""
        known = [field.name for field in dataclasses.fields(cls)]
        check_known("key of a layer spec", values, known)
        changed = values.get("transform")
        return cls(
            weight=TensorSpec.from_dict(values.get("weight", {})),
            input=TensorSpec.from_dict(values["input"]) if "input" in values else None,
            input_splits=tuple(values.get("input_splits", ())),
            kept_every=values.get("kept_every", 0),
            transform=None if changed is None else TransformSpec.from_dict(changed),
            tabled=tuple(map(float, values.get("tabled", ()))),
            output_groups=tuple(map(float, values.get("output_groups", ()))),
            salient=TensorSpec.from_dict(values["salient"]) if "salient" in values else None,
            salient_channels=values.get("salient_channels", 0),
        )

    def __str__(self) -> str:
        split = f" split {'+'.join(map(str, self.input_splits))}" if self.input_splits else ""
        kept = f" keeps 1 of {self.kept_every} tokens" if self.kept_every else ""
        changed = "" if self.transform is None else f" {self.transform}"
        tabled = f" tabled at {len(self.tabled)} timesteps" if self.tabled else ""
        groups = len(self.output_groups)
        corrected = f" corrected in {groups} step groups" if groups else ""
        known = f"{split}{kept}{changed}{tabled}{corrected}"
        more = f" with {self.salient_channels} of {self.salient}" if self.salient else ""
        return f"{self.weight}{more} | {self.input or 'float'}{known}"


def check_whole(spec: LayerSpec) -> None:
    """Refuse weights of which some channels have more bits.

    Raises:
        DQError: If there are such channels.
    """
    if spec.salient is not None:
        raise DQError(
            f"{spec.weight} with salient channels is rounded to nearest, or learned by binarydm: "
            "leave this step out"
        )


@dataclass(frozen=True)
class Plan:
    """Which layers of a denoiser are quantized, and how; others stay as they are.

    Args:
        model: Class name of the denoiser that it was made for.
        layers: Module name to spec.
        notes: Module name to one sentence, where the recipe was not followed to the letter.
        attention: Name of an attention to the spec of its operands; those of others stay float.
        version: Of the file format.
    """

    model: str
    layers: Mapping[str, LayerSpec]
    notes: Mapping[str, str] = field(default_factory=dict)
    attention: Mapping[str, AttentionSpec] = field(default_factory=dict)
    version: int = PLAN_VERSION

    def is_static(self) -> bool:
        """Whether any input has scales that calibration must find."""
        return any(spec.is_static for spec in self.layers.values())

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; equal specs are written once."""
        specs, layers = _numbered(self.layers)
        values: dict[str, Any] = {
            "version": self.version,
            "model": self.model,
            "specs": specs,
            "layers": layers,
        }
        if self.notes:
            values["notes"] = dict(self.notes)
        if self.attention:
            specs, sites = _numbered(self.attention)
            values["attention"] = {"specs": specs, "sites": sites}
        return values

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
        known = ("version", "model", "specs", "layers", "notes", "attention")
        check_known("key of a plan", values, known)
        for key in known[:4]:
            if key not in values:
                raise DQError(f"the plan has no {key!r}")
        layers = _read(values["specs"], values["layers"], LayerSpec.from_dict, "layer")
        operands = values.get("attention", {"specs": [], "sites": {}})
        with inside("attention"):
            attention = _read(
                operands["specs"], operands["sites"], AttentionSpec.from_dict, "attention"
            )
        return cls(values["model"], layers, dict(values.get("notes", {})), attention)


class _Spec(Protocol):
    def to_dict(self) -> dict[str, Any]: ...


def _numbered(specs: Mapping[str, _Spec]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Return each different spec once, and its number by name."""
    table: dict[_Spec, int] = {}
    numbers = {name: table.setdefault(spec, len(table)) for name, spec in specs.items()}
    return [spec.to_dict() for spec in table], numbers


def _read(
    entries: Sequence[dict[str, Any]],
    numbers: Mapping[str, int],
    read: Callable[[dict[str, Any]], T],
    kind: str,
) -> dict[str, T]:
    """Invert `_numbered`."""
    specs = []
    for index, entry in enumerate(entries):
        with inside(f"specs[{index}]"):
            specs.append(read(entry))
    found = {}
    for name, index in numbers.items():
        if not isinstance(index, int) or not 0 <= index < len(specs):
            raise DQError(f"{kind} {name} refers to spec {index!r} of {len(specs)}")
        found[name] = specs[index]
    return found
