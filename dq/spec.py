"""How one tensor is quantized: format, granularity, and what its scales look like."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

from dq.errors import DQError, unknown
from dq.formats import Format, IntFormat, formats
from dq.packing import packed_length

__all__ = ["Granularity", "TensorSpec"]


@dataclass(frozen=True)
class Granularity:
    """Which elements share one scale.

    Weights are seen as matrices `(N, K)`: output channels by everything that is summed over
    (`in` for Linear, `in/groups * kh * kw` for Conv2d). Inputs of a Linear are `(tokens, K)`; those
    of a Conv2d are `(images, C * H * W)`, so that a "token" of a convolution is one image.

    | written     | shares one scale                  | scales of an `(R, K)` matrix |
    |-------------|-----------------------------------|------------------------------|
    | `"tensor"`  | everything                        | `(1, 1)`                     |
    | `"channel"` | a row of a weight                 | `(R, 1)`                     |
    | `"token"`   | a row of an input                 | `(R, 1)`                     |
    | `"group32"` | 32 neighbours in a row            | `(R, K / 32)`                |

    Args:
        kind: One of tensor, channel, token, group.
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
        if text in ("tensor", "channel", "token"):
            return cls(text)
        if text.startswith("group") and text[5:].isdecimal() and int(text[5:]) > 0:
            return cls("group", int(text[5:]))
        raise unknown("granularity", text, ("tensor", "channel", "token", "group32", "group64"))

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
        scale_format: "float32", or an unsigned integer format for two-level scales: one float32 a
            row times an integer multiplier a group, `1 + code`. Code times multiplier then is an
            8-bit integer, and products with integer inputs stay exact (the QServe construction,
            arXiv 2405.04532, section 4.2).
    """

    format: str
    granularity: Granularity
    symmetric: bool = True
    dynamic: bool = False
    observer: str = "absmax"
    scale_format: str = "float32"

    def __post_init__(self) -> None:
        grid = self.grid
        if not self.symmetric and not isinstance(grid, IntFormat):
            raise DQError(f"asymmetric {self.format}: only integer formats have a zero point")
        if self.scale_format == "float32":
            return
        multiplier = formats[self.scale_format]
        if not isinstance(multiplier, IntFormat) or multiplier.signed:
            raise DQError(
                f"scale_format {self.scale_format!r} is not float32 or an unsigned integer format"
            )
        if self.granularity.kind != "group" or not self.symmetric or not grid.is_integer:
            raise DQError("integer scales need a symmetric integer format with groups")
        if -grid.low * (multiplier.high + 1) > 128:
            raise DQError(
                f"{self.format} codes times {self.scale_format} multipliers leave the int8 range; "
                f"at most {8 - grid.bits} bits of multiplier fit {grid.bits}-bit codes"
            )

    @property
    def grid(self) -> Format:
        """The format itself."""
        return formats[self.format]

    def bytes(self, rows: int, columns: int) -> int:
        """Return how many bytes a `(rows, columns)` matrix takes: codes, scales and zero points."""
        r, g = self.granularity.blocks(rows, columns)
        total = rows * packed_length(columns, self.grid.bits)
        if self.scale_format == "float32":
            total += 4 * r * g
        else:
            total += 4 * r + r * packed_length(g, formats[self.scale_format].bits)
        return total if self.symmetric else total + r * packed_length(g, self.grid.bits)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; fields at their default are left out."""
        values: dict[str, Any] = {"format": self.format, "granularity": str(self.granularity)}
        for field in dataclasses.fields(self)[2:]:
            if getattr(self, field.name) != field.default:
                values[field.name] = getattr(self, field.name)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Invert `to_dict`.

        Raises:
            DQError: For an unknown or missing key, or a value that does not fit.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                raise unknown("key of a tensor spec", key, names)
        for key in ("format", "granularity"):
            if key not in values:
                raise DQError(f"a tensor spec needs the key {key!r}")
        rest = {k: v for k, v in values.items() if k != "granularity"}
        return cls(granularity=Granularity.parse(values["granularity"]), **rest)

    def __str__(self) -> str:
        words = [self.format, str(self.granularity)]
        words += [] if self.symmetric else ["asymmetric"]
        words += ["dynamic"] if self.dynamic else []
        words += [] if self.scale_format == "float32" else [f"{self.scale_format} scales"]
        return " ".join(words)
