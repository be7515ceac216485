"""Attention processors with another attention: a faster one, or one with quantized operands."""

from dq.attention.processors import exact, install, quantize, sites, specs_of, uninstall

__all__ = ["exact", "install", "quantize", "sites", "specs_of", "uninstall"]
