"""Attention processors with another attention: faster, or changed as a plan says."""

from dq.attention.processors import (
    change,
    empty_sites,
    exact,
    install,
    sites,
    specs_of,
    tapped,
    uninstall,
)

__all__ = [
    "change",
    "empty_sites",
    "exact",
    "install",
    "sites",
    "specs_of",
    "tapped",
    "uninstall",
]
