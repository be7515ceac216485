"""Which operators ran, and how long each took: read from torch's profiler, not from intentions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch.autograd.profiler_legacy import profile  # the newer one prints two lines at each use

__all__ = ["Operator", "operators", "products"]

_RUNS = 3
_PRODUCT = re.compile(
    r"::(addmm|b?mm|_int_mm|_scaled_mm\w*|\w*conv\w+|qlinear\w*|linear_rows|\w*attention\w*)$"
)


@dataclass(frozen=True)
class Operator:
    """One operator within a forward call.

    Args:
        name: As torch calls it, e.g. "onednn::qlinear_pointwise".
        calls: How often it ran.
        milliseconds: Time of all its calls, without the operators that it called itself.
    """

    name: str
    calls: int
    milliseconds: float


def operators(run: Callable[[], object]) -> tuple[Operator, ...]:
    """Return the operators of one call of `run`, the slowest first."""
    with profile() as seen:
        for _ in range(_RUNS):
            run()
    found = [
        Operator(event.key, event.count // _RUNS, event.self_cpu_time_total / _RUNS / 1e3)
        for event in seen.key_averages()
    ]
    return tuple(sorted(found, key=lambda operator: -operator.milliseconds))


def products(found: Iterable[Operator]) -> str:
    """Say in words which kernels multiplied: those that took 1 % of the time or more."""
    found = tuple(found)
    least = sum(operator.milliseconds for operator in found) / 100
    return ", ".join(
        f"{operator.calls} {operator.name.partition('::')[2]}"
        for operator in found
        if operator.milliseconds >= least
        and _PRODUCT.search(operator.name)
        and not operator.name.startswith("dq::")  # ours only call those that multiply
    )
