"""The blocks that hardware multiplies: OCP MX and NVFP4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["BLOCK_FORMATS", "BlockFormat"]


class BlockFormat(NamedTuple):
    """Elements that share a scale of a few bits.

    Attributes:
        format: Of the elements.
        size: How many share a scale.
        scale_format: "e8m0" of MX; "e4m3" of NVFP4, times a float32.
    """

    format: str
    size: int
    scale_format: str


BLOCK_FORMATS: Mapping[str, BlockFormat] = {
    "nvfp4": BlockFormat("e2m1", 16, "e4m3"),
    "mxfp4": BlockFormat("e2m1", 32, "e8m0"),
    "mxfp6": BlockFormat("e2m3", 32, "e8m0"),
    "mxfp6-e3m2": BlockFormat("e3m2", 32, "e8m0"),
    "mxfp8": BlockFormat("e4m3", 32, "e8m0"),
    "mxfp8-e5m2": BlockFormat("e5m2", 32, "e8m0"),
}
"""By name. The OCP MX specification 1.0 leaves two forms to 6 and 8 bits each."""
