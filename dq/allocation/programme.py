"""The programme solved exactly, by HiGHS through `scipy.optimize.milp`."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import numpy as np
from scipy import optimize, sparse

from dq.allocation.lagrange import relax
from dq.allocation.problem import Choice, Option, Problem
from dq.errors import DQError

__all__ = ["smallest", "solve"]

T = TypeVar("T")

_SCALE = 1e4  # of the objective: HiGHS is content with an absolute gap of 1e-6


def solve(problem: Problem, time_limit: float = 20.0) -> Choice:
    """Return the choice with the least cost.

    Args:
        problem: What is to be decided.
        time_limit: Seconds after which the best choice so far is taken; the relaxed one if that is
            better, or if there is none.

    Returns:
        One option a layer.

    Raises:
        DQError: If no choice keeps the budgets; says what the smallest one would be.
    """
    exact, impossible = _milp(problem, time_limit)
    if exact is not None and exact.proven:
        return exact.choice
    relaxed = None if impossible else relax(problem)
    found = [c for c in (None if exact is None else exact.choice, relaxed) if c is not None]
    if found:
        return min(found, key=problem.cost)
    raise DQError(_infeasible(problem))


class _Solution(NamedTuple):
    choice: Choice
    proven: bool


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep lines that HiGHS writes for its own developers off the standard output.

    They come from C, so the file descriptor is turned away, not `sys.stdout`.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


_Columns = Sequence[tuple[str, Option]]


def _milp(problem: Problem, time_limit: float) -> tuple[_Solution | None, bool]:
    """Return the solution, if one was found, and whether there can be none."""
    columns = [(name, option) for name, options in problem.layers.items() for option in options]
    costs = np.array([option.cost for _, option in columns])
    costs = costs - costs.min() if len(costs) else costs  # one option a layer: a constant
    widest = costs.max() or 1.0
    rows: list[optimize.LinearConstraint] = [_one_each(problem, columns)]
    for index, budget in enumerate(problem.budgets):
        amounts = np.array([option.amounts[index] for _, option in columns])
        scale = max(abs(budget.limit), np.abs(amounts).max(), 1e-300)
        # Entries below 1e-9 are dropped; a row is as good in any unit.
        row = sparse.csr_array((amounts / scale * 1e3)[None])
        rows.append(optimize.LinearConstraint(row, -np.inf, budget.limit / scale * 1e3))
    rows += _tied(problem, columns)
    with _hushed():
        result = optimize.milp(
            costs / widest * _SCALE,
            constraints=rows,
            integrality=np.ones(len(columns)),
            bounds=optimize.Bounds(0, 1),
            options={"time_limit": time_limit, "mip_rel_gap": 1e-6},
        )
    if result.x is None:
        return None, result.status == 2
    choice = {name: option for (name, option), x in zip(columns, result.x, strict=True) if x > 0.5}
    return _Solution(choice, result.status == 0), False


def _one_each(problem: Problem, columns: _Columns) -> optimize.LinearConstraint:
    place = {name: index for index, name in enumerate(problem.layers)}
    rows = [place[name] for name, _ in columns]
    shape = len(place), len(columns)
    matrix = sparse.csr_array((np.ones(len(columns)), (rows, range(len(columns)))), shape=shape)
    return optimize.LinearConstraint(matrix, 1, 1)


def _tied(problem: Problem, columns: _Columns) -> list[optimize.LinearConstraint]:
    """Return, for each tie and each two neighbours in a group, that both take it or neither."""
    entries: list[tuple[int, int, float]] = []
    count = 0
    for group in problem.ties:
        for one, other in itertools.pairwise(group):
            for tie in sorted({o.tie for name in (one, other) for o in problem.layers[name]}):
                for column, (name, option) in enumerate(columns):
                    if option.tie == tie and name in (one, other):
                        entries.append((count, column, 1.0 if name == one else -1.0))
                count += 1
    if not count:
        return []
    rows, places, values = zip(*entries, strict=True)
    matrix = sparse.csr_array((values, (rows, places)), shape=(count, len(columns)))
    return [optimize.LinearConstraint(matrix, 0, 0)]


def smallest(problem: Problem, index: int, time_limit: float = 20.0) -> float | None:
    """Return the smallest limit of one budget that can be kept together with the others.

    Args:
        problem: What is to be decided.
        index: Of the budget.
        time_limit: In seconds.

    Returns:
        The limit; None if the others cannot be kept whatever it is.
    """
    layers = {
        name: tuple(
            Option(o.name, o.amounts[index], _without(o.amounts, index), o.tie) for o in options
        )
        for name, options in problem.layers.items()
    }
    rest = Problem(layers, _without(problem.budgets, index), problem.ties)
    found, _ = _milp(rest, time_limit)
    return None if found is None else sum(option.cost for option in found.choice.values())


def _without(values: tuple[T, ...], index: int) -> tuple[T, ...]:
    return values[:index] + values[index + 1 :]


def _infeasible(problem: Problem) -> str:
    words = []
    for index, budget in enumerate(problem.budgets):
        least = smallest(problem, index)
        if least is not None:
            words.append(
                f"{budget.name}: {budget.limit:,.6g} is asked for, {least:,.6g} is possible"
            )
    said = "; ".join(words) or "the budgets exclude each other"
    return f"no choice of formats keeps the budgets ({said}); allow more, or shorter formats"
