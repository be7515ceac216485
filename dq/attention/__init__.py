"""Attention processors with another attention: faster, or changed as a plan says."""

from dq.attention.processors import (
    change,
    empty_sites,
    exact,
    install,
    lost,
    path,
    site_of,
    sites,
    specs_of,
    tapped,
    uninstall,
)
from dq.nn.token_site import SITE

__all__ = [
    "SITE",
    "change",
    "empty_sites",
    "exact",
    "install",
    "lost",
    "path",
    "site_of",
    "sites",
    "specs_of",
    "tapped",
    "uninstall",
]
