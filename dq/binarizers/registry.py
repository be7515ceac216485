"""The registry of binarizers."""

from __future__ import annotations

from dq.binarizers.binarizer import Binarizer
from dq.registry import Registry

__all__ = ["binarizers"]

binarizers: Registry[type[Binarizer]] = Registry("binarizer", home="dq.binarizers")
