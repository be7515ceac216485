"""The programme relaxed: a price for each budget, and every layer picks what is best for it.

Needs nothing but arithmetic, and lands within a fraction of a decibel of the exact optimum where
there are many layers: only one of them sits between two options (Everett 1963).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from dq.allocation.problem import Choice, Option, Problem

__all__ = ["relax"]

_HALVINGS = 24
_MOVES = 4  # at most, a layer
_PAIRED = 300  # moves of each kind that are tried together


def relax(problem: Problem) -> Choice | None:
    """Return a good feasible choice; None if none was found.

    Args:
        problem: With any number of budgets.
    """
    prices = [0.0] * len(problem.budgets)
    found = _settle(problem, prices, 0)
    return _polished(problem, found, prices) if problem.is_feasible(found) else None


def _settle(problem: Problem, prices: list[float], index: int) -> Choice:
    """Set the prices of the budgets from `index` on to the lowest that keep them.

    Each trial of a price settles all that follow it.

    Args:
        problem: What is to be decided.
        prices: Changed in place.
        index: Of the first price to set.

    Returns:
        The choice at these prices; not feasible if no price is high enough.
    """
    if index == len(prices):
        return _cheapest(problem, prices)
    limit = problem.budgets[index].limit

    def keeps(price: float) -> bool:
        prices[index] = price
        return problem.amounts(_settle(problem, prices, index + 1))[index] <= limit

    best = 0.0 if keeps(0.0) else _bisect(keeps, _scale(problem, index))
    prices[index] = best
    return _settle(problem, prices, index + 1)


def _scale(problem: Problem, index: int) -> float:
    """Return a price of the right order: all costs over all amounts."""
    costs = sum(max(abs(o.cost) for o in options) for options in problem.layers.values())
    amounts = sum(
        max(abs(o.amounts[index]) for o in options) for options in problem.layers.values()
    )
    return (costs or 1.0) / (amounts or 1.0)


def _bisect(keeps: Callable[[float], bool], high: float) -> float:
    for _ in range(_HALVINGS):
        if keeps(high):
            break
        high *= 4.0
    low = 0.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if keeps(middle) else (middle, high)
    return high


def _cheapest(problem: Problem, prices: Sequence[float]) -> Choice:
    """Return the choice with the least cost plus price of what it takes."""

    def priced(option: Option) -> float:
        return _priced(option, prices)

    choice: Choice = {}
    for unit in problem.units():
        picks = _picks(problem, unit, priced)
        best = min(picks, key=lambda pick: sum(map(priced, pick)))
        choice |= zip(unit, best, strict=True)
    return choice


def _priced(option: Option, prices: Sequence[float]) -> float:
    return option.cost + sum(p * a for p, a in zip(prices, option.amounts, strict=True))


def _picks(
    problem: Problem, unit: tuple[str, ...], priced: Callable[[Option], float]
) -> list[tuple[Option, ...]]:
    """Return the best options of the layers of a unit, for each tie that all of them offer."""
    ties = set.intersection(*({o.tie for o in problem.layers[name]} for name in unit))
    return [
        tuple(min((o for o in problem.layers[n] if o.tie == tie), key=priced) for n in unit)
        for tie in sorted(ties)
    ]


class _Move(NamedTuple):
    """A change of one unit's options."""

    cost: float  # negative is better
    amounts: tuple[float, ...]  # what it takes more
    options: Choice


def _polished(problem: Problem, choice: Choice, prices: Sequence[float]) -> Choice:
    """Improve a feasible choice by moves of one unit, then by pairs: one pays for the other."""
    best = dict(choice)
    for _ in range(_MOVES * len(problem.layers)):
        spent = problem.amounts(best)
        left = [budget.limit - a for budget, a in zip(problem.budgets, spent, strict=True)]
        moves = [move for unit in problem.units() for move in _moves(problem, unit, best, prices)]
        found = _single(moves, left, problem) or _pair(moves, left)
        if not found:
            break
        best |= found
    return best


def _moves(
    problem: Problem, unit: tuple[str, ...], choice: Choice, prices: Sequence[float]
) -> Iterator[_Move]:
    """Yield the changes of one layer within its tie, and those of all to another tie."""
    for name in unit:
        for option in problem.layers[name]:
            if option is not choice[name] and option.tie == choice[name].tie:
                yield _move(choice, {name: option})
    if len(unit) > 1 or len({option.tie for option in problem.layers[unit[0]]}) > 1:
        for pick in _picks(problem, unit, lambda option: _priced(option, prices)):
            if pick[0].tie != choice[unit[0]].tie:
                yield _move(choice, dict(zip(unit, pick, strict=True)))


def _move(choice: Choice, options: Choice) -> _Move:
    more = [
        [a - b for a, b in zip(option.amounts, choice[name].amounts, strict=True)]
        for name, option in options.items()
    ]
    cost = sum(option.cost - choice[name].cost for name, option in options.items())
    return _Move(cost, tuple(map(sum, zip(*more, strict=True))), options)


def _affordable(amounts: Iterable[float], left: Sequence[float]) -> bool:
    return all(a <= max(rest, 0.0) or a <= 0.0 for a, rest in zip(amounts, left, strict=True))


def _single(moves: Sequence[_Move], left: Sequence[float], problem: Problem) -> Choice | None:
    """Return the affordable move that gains most for what it takes."""

    def rate(move: _Move) -> float:
        shares = [
            max(a, 0.0) / (abs(budget.limit) or 1.0)
            for a, budget in zip(move.amounts, problem.budgets, strict=True)
        ]
        return -move.cost / max(sum(shares), 1e-12)

    better = [move for move in moves if move.cost < 0 and _affordable(move.amounts, left)]
    return max(better, key=rate).options if better else None


def _pair(moves: Sequence[_Move], left: Sequence[float]) -> Choice | None:
    """Return the two moves that gain most together, among the most promising ones."""
    better = sorted((m for m in moves if m.cost < 0), key=lambda m: m.cost)[:_PAIRED]
    worse = sorted((m for m in moves if m.cost > 0), key=lambda m: m.cost)[:_PAIRED]
    best, found = 0.0, None
    for one in better:
        for other in worse:
            total = one.cost + other.cost
            if total >= best:
                break  # those that follow cost more
            if one.options.keys() & other.options.keys():
                continue
            if _affordable(map(sum, zip(one.amounts, other.amounts, strict=True)), left):
                best, found = total, one.options | other.options
    return found
