"""How one tensor is quantized: format, granularity, and what its scales look like."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

from dq.block_formats import BLOCK_FORMATS, BlockFormat
from dq.errors import DQError, check_known, unknown
from dq.formats import FloatFormat, Format, IntFormat, PowerFormat, formats
from dq.packing import packed_length

__all__ = ["Granularity", "TensorSpec"]

_FP8 = ("e4m3", "e5m2")
_BLOCK_NAMES = {blocks: name for name, blocks in BLOCK_FORMATS.items()}


def _rules(scales: Format, grid: Format) -> tuple[str, ...]:
    """Return the ways to find scales of a format for groups on a grid; none if it is for none."""
    if isinstance(scales, IntFormat):
        return () if scales.signed else ("search",)
    if isinstance(scales, PowerFormat):
        even = ("even",) if isinstance(grid, FloatFormat) else ()
        return ("search", "floor", "ceil", "rceil", *even)
    if isinstance(scales, FloatFormat) and scales.high >= 256:
        return ("search", "nearest", *(("four-six",) if grid.high == 6 else ()))
    return ()


@dataclass(frozen=True)
class Granularity:
    """Which elements share one scale.

    Weights are seen as matrices `(N, K)`: output channels by everything that is summed over
    (`in` for Linear, `in/groups * kh * kw` for Conv2d). Inputs of a Linear are `(tokens, K)`; those
    of a Conv2d are `(images, C * H * W)`, so that a "token" of a convolution is one image; only in
    groups they are `(pixels, C)`.

    | written     | shares one scale                  | scales of an `(R, K)` matrix |
    |-------------|-----------------------------------|------------------------------|
    | `"tensor"`  | everything                        | `(1, 1)`                     |
    | `"channel"` | a row of a weight                 | `(R, 1)`                     |
    | `"token"`   | a row of an input                 | `(R, 1)`                     |
    | `"group32"` | 32 neighbours in a row            | `(R, K / 32)`                |
    | `"block"`   | a block of an attention, as a row | `(R, 1)`                     |

    Args:
        kind: One of tensor, channel, token, group, block.
        size: Elements in a group; 0 for the other kinds.
    """

    kind: str
    size: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the written form of the table.

        Raises:
            DQError: If `text` is none of them.
        """
        if text in ("tensor", "channel", "token", "block"):
            return cls(text)
        if text.startswith("group") and text[5:].isdecimal() and int(text[5:]) > 0:
            return cls("group", int(text[5:]))
        known = ("tensor", "channel", "token", "group32", "group64", "block")
        raise unknown("granularity", text, known)

    def __str__(self) -> str:
        return f"{self.kind}{self.size}" if self.size else self.kind

    def blocks(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the shape of the scales of a `(rows, columns)` matrix.

        Raises:
            DQError: If a group does not divide the columns; names the divisors near it.
        """
        if self.kind == "tensor":
            return 1, 1
        if self.kind != "group":
            return rows, 1
        if columns % self.size:
            divisors = [d for d in range(8, columns + 1) if columns % d == 0]
            near = sorted(sorted(divisors, key=lambda d: abs(d - self.size))[:3])
            raise DQError(
                f"group size {self.size} does not divide {columns} input features; "
                f"divisors near it: {', '.join(map(str, near)) or 'none'}"
            )
        return rows, columns // self.size


@dataclass(frozen=True)
class TensorSpec:
    """How one tensor is quantized.

    Args:
        format: Name of the grid of levels.
        granularity: Which elements share a scale.
        symmetric: Zero is the level 0, nothing is stored for it; else x = scale * (level - zero).
        dynamic: Scales are computed from each input at run time instead of once in calibration.
        observer: How ranges are chosen: absmax, percentile or mse.
        scale_format: "float32"; or what the scales of groups are written in, see `dq.blocks`. An
            unsigned integer format: one float32 a row times an integer multiplier a group,
            `1 + code`. Code times multiplier then is an 8-bit integer, and products with integer
            inputs stay exact (the QServe construction, arXiv 2405.04532, section 4.2). "e8m0":
            powers of two (OCP MX). "e4m3": times a float32 for the whole tensor (NVFP4).
        scale_rule: How such scales are found; see `dq.blocks`.
        bases: How many scaled signs the format "binary" adds up; see `dq.bases`. With asymmetric
            ones an offset is added.
        step_groups: Timesteps, ascending: a static input then has scales for each of them, and a
            call those of the nearest. Empty for the same ones at every timestep.
    """

    format: str
    granularity: Granularity
    symmetric: bool = True
    dynamic: bool = False
    observer: str = "absmax"
    scale_format: str = "float32"
    scale_rule: str = "search"
    step_groups: tuple[float, ...] = ()
    bases: int = 1

    def __post_init__(self) -> None:
        grid = self.grid
        if grid.low > 0:
            raise DQError(f"{self.format} has no zero: it is for scales, not for values")
        if not self.symmetric and not (isinstance(grid, IntFormat) or self.is_binary):
            raise DQError(
                f"asymmetric {self.format}: only integers have a zero point, signs an offset"
            )
        if not 1 <= self.bases <= 8:
            raise DQError(f"bases is 1 to 8, not {self.bases}")
        if self.bases > 1 and not self.is_binary:
            raise DQError(f"{self.bases} bases: only the format binary adds them up")
        if self.is_binary and (self.dynamic or self.granularity.kind not in ("channel", "group")):
            raise DQError("binary is for weights, by channel or group: inputs have 2 bits or more")
        if list(self.step_groups) != sorted(set(self.step_groups)):
            raise DQError(f"step groups are ascending timesteps, not {self.step_groups}")
        if self.dynamic and self.step_groups:
            raise DQError("dynamic scales fit every step: step groups are for static ones")
        scales = self.scale_grid
        rules = ("search",) if scales is None else _rules(scales, grid)
        if not rules:
            raise DQError(
                f"scale_format {self.scale_format!r} is not float32, an unsigned integer format, "
                "e8m0 or e4m3"
            )
        if self.scale_rule not in rules:
            raise unknown(f"scale_rule of {self.scale_format}", self.scale_rule, rules)
        if isinstance(scales, IntFormat):
            self._check_integer_scales(scales)
        elif scales is not None:
            if self.granularity.kind != "group" or not self.symmetric:
                raise DQError(f"{self.scale_format} scales need a symmetric format with groups")
            if self.observer != "absmax":
                raise DQError(
                    f"{self.scale_format} scales are found by scale_rule: observer absmax only, "
                    f"not {self.observer}"
                )

    def _check_integer_scales(self, multiplier: IntFormat) -> None:
        grid = self.grid
        if self.granularity.kind != "group" or not self.symmetric or not grid.is_integer:
            raise DQError("integer scales need a symmetric integer format with groups")
        if self.bases > 1:
            raise DQError("the groups of several bases have float32 scales, each basis its own")
        most = multiplier.high + 1
        if -grid.low * most > 128 or grid.high * most > 127:
            raise DQError(
                f"{self.format} codes times {self.scale_format} multipliers leave the int8 range; "
                f"at most {8 - grid.bits} bits of multiplier fit {grid.bits}-bit codes"
            )

    @property
    def grid(self) -> Format:
        """The format itself."""
        return formats[self.format]

    @property
    def is_binary(self) -> bool:
        """Whether values are sums of scaled signs."""
        return self.format == "binary"

    @property
    def code_bits(self) -> int:
        """Width of the code of one element."""
        return self.grid.bits * self.bases

    @property
    def scale_grid(self) -> Format | None:
        """What the scales of groups are written in; None for float32."""
        return None if self.scale_format == "float32" else formats[self.scale_format]

    @property
    def has_float_blocks(self) -> bool:
        """Whether groups have scales of a few bits, floats or powers of two."""
        return self.scale_grid is not None and not isinstance(self.scale_grid, IntFormat)

    @property
    def block_format(self) -> str | None:
        """The name in `dq.block_formats`; None for other blocks, and where there are none."""
        blocks = BlockFormat(self.format, self.granularity.size, self.scale_format)
        return _BLOCK_NAMES.get(blocks)

    @property
    def scaled_by_row(self) -> bool:
        """Whether a row of a weight has one float32 scale, whatever whole numbers it meets."""
        return self.granularity.kind == "channel" or isinstance(self.scale_grid, IntFormat)

    @property
    def is_int8(self) -> bool:
        """Whether a weight is signed integers of at most 8 bits, multipliers included, by row."""
        whole = self.grid.is_integer and self.grid.low < 0 and self.bases == 1
        return whole and self.symmetric and self.scaled_by_row

    @property
    def outer_by_row(self) -> bool:
        """Whether each row has the float32 scale that multipliers stand upon; else all share it."""
        scales = self.scale_grid
        return isinstance(scales, IntFormat) or (self.dynamic and isinstance(scales, FloatFormat))

    @property
    def is_deployable(self) -> bool:
        """Whether some hardware multiplies the format; others are emulated, wherever they run.

        Integers, but with a scale for every single channel that is summed over; floats by tensor,
        channel or token whose levels are all e4m3 or e5m2 ones (e2m1, e2m3 and e3m2 are); MX and
        NVFP4 blocks; signs, of one basis.
        """
        if self.grid.is_integer:
            return self.granularity.size != 1 and self.bases == 1
        if self.has_float_blocks:
            return self.block_format is not None
        return self.granularity.kind != "group" and any(
            formats[name].contains(self.grid) for name in _FP8
        )

    def bytes(self, rows: int, columns: int) -> int:
        """Return how many bytes a `(rows, columns)` matrix takes: codes, scales and zero points."""
        r, g = self.granularity.blocks(rows, columns)
        total = rows * packed_length(columns, self.code_bits)
        if self.is_binary and self.scale_grid is None:
            return total + 4 * r * g * (self.bases + (not self.symmetric))
        if self.scale_grid is None:
            total += 4 * r * g
        else:
            total += 4 * (r if self.outer_by_row else 1)
            total += r * packed_length(g, self.scale_grid.bits)
        return total if self.symmetric else total + r * packed_length(g, self.grid.bits)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; fields at their default are left out."""
        values: dict[str, Any] = {"format": self.format, "granularity": str(self.granularity)}
        for field in dataclasses.fields(self)[2:]:
            if getattr(self, field.name) != field.default:
                value = getattr(self, field.name)
                values[field.name] = list(value) if isinstance(value, tuple) else value
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Invert `to_dict`.

        Raises:
            DQError: For an unknown or missing key, or a value that does not fit.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        check_known("key of a tensor spec", values, names)
        for key in ("format", "granularity"):
            if key not in values:
                raise DQError(f"a tensor spec needs the key {key!r}")
        rest = {k: v for k, v in values.items() if k != "granularity"}
        if "step_groups" in rest:  # a list in JSON
            rest["step_groups"] = tuple(map(float, rest["step_groups"]))
        return cls(granularity=Granularity.parse(values["granularity"]), **rest)

    def __str__(self) -> str:
        words = [self.format, str(self.granularity)]
        words += [f"of {self.bases} bases"] if self.bases > 1 else []
        words += [] if self.symmetric else ["asymmetric"]
        words += ["dynamic"] if self.dynamic else []
        words += [] if self.scale_grid is None else [f"{self.scale_format} scales"]
        words += [] if self.scale_rule == "search" else [self.scale_rule]
        words += [f"in {len(self.step_groups)} step groups"] if self.step_groups else []
        return " ".join(words)
