"""The end of a recipe's name that says how weights are rounded."""

from __future__ import annotations

import re
from collections.abc import Mapping

from dq.method import Method
from dq.methods.adaround import AdaRound
from dq.methods.gptq import GPTQ

__all__ = ["ROUNDING", "rounding"]

_STEPS: Mapping[str, tuple[Method, ...]] = {"rtn": (), "gptq": (GPTQ(),), "adaround": (AdaRound(),)}
ROUNDING = rf"(-(?P<rounding>{'|'.join(_STEPS)}))?"


def rounding(found: re.Match[str], default: str) -> tuple[Method, ...]:
    """Return the steps of a recipe that round its weights: none for the nearest level.

    Args:
        found: A match with `ROUNDING` in its pattern.
        default: "rtn", "gptq" or "adaround".
    """
    return _STEPS[found["rounding"] or default]
