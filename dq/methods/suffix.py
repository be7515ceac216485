"""The ends of recipes' names: how inputs are changed, and how weights are rounded."""

from __future__ import annotations

import re
from collections.abc import Mapping

from dq.method import Method
from dq.methods.adaround import AdaRound
from dq.methods.gptq import GPTQ
from dq.methods.hadamard import Hadamard
from dq.methods.outliers import OutlierSuppression
from dq.methods.preshift import PreShift
from dq.methods.salience import Salience
from dq.methods.signround import SignRound
from dq.methods.smoothquant import SmoothQuant
from dq.methods.unsigned import Unsigned

__all__ = ["ROUNDING", "SUFFIX", "changes", "rounding"]

_CHANGES: Mapping[str, tuple[Method, ...]] = {
    "smooth": (SmoothQuant(),),
    "salience": (Salience(),),
    "outliers": (OutlierSuppression(),),
    "hadamard": (Hadamard(),),
    "preshift": (PreShift(),),
    "unsigned": (Unsigned(),),
}

_STEPS: Mapping[str, tuple[Method, ...]] = {
    "rtn": (),
    "gptq": (GPTQ(),),
    "adaround": (AdaRound(),),
    "signround": (SignRound(),),
}
ROUNDING = rf"(-(?P<rounding>{'|'.join(_STEPS)}))?"
SUFFIX = rf"(-(?P<change>{'|'.join(_CHANGES)}))?" + ROUNDING


def changes(found: re.Match[str]) -> tuple[Method, ...]:
    """Return the steps of a recipe that change inputs, for a match with `SUFFIX` in its pattern."""
    return _CHANGES.get(found["change"], ())


def rounding(found: re.Match[str], default: str) -> tuple[Method, ...]:
    """Return the steps of a recipe that round its weights: none for the nearest level.

    Args:
        found: A match with `ROUNDING` in its pattern.
        default: "rtn", "gptq", "adaround" or "signround".
    """
    return _STEPS[found["rounding"] or default]
