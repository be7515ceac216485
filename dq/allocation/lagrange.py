"""The programme relaxed: a price for each budget, and every layer picks what is best for it.

Needs nothing but arithmetic, and lands within a fraction of a decibel of the exact optimum where
there are many layers: only one of them sits between two options (Everett 1963).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dq.allocation.problem import Choice, Option, Problem

__all__ = ["relax"]

_ROUNDS = 4  # over the budgets, when there are several
_HALVINGS = 32


def relax(problem: Problem) -> Choice | None:
    """Return a good feasible choice; None if none was found.

    Args:
        problem: With any number of budgets.
    """
    prices = [0.0] * len(problem.budgets)
    best: Choice | None = None
    for _ in range(_ROUNDS if len(prices) > 1 else 1):
        for index in range(len(prices)):
            prices[index] = _price(problem, prices, index)
        found = _cheapest(problem, prices)
        if problem.is_feasible(found) and (
            best is None or problem.cost(found) < problem.cost(best)
        ):
            best = found
    if not prices:
        best = _cheapest(problem, prices)
    return None if best is None else _filled(problem, best)


def _price(problem: Problem, prices: Sequence[float], index: int) -> float:
    """Return the lowest price of one budget that keeps it, at given prices of the others."""
    trial = list(prices)
    limit = problem.budgets[index].limit

    def keeps(price: float) -> bool:
        trial[index] = price
        return problem.amounts(_cheapest(problem, trial))[index] <= limit

    if keeps(0.0):
        return 0.0
    return _bisect(keeps, _scale(problem, index))


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
        return option.cost + sum(p * a for p, a in zip(prices, option.amounts, strict=True))

    choice: Choice = {}
    for unit in problem.units():
        picks = _picks(problem, unit, priced)
        best = min(picks, key=lambda pick: sum(map(priced, pick)))
        choice |= zip(unit, best, strict=True)
    return choice


def _picks(
    problem: Problem, unit: tuple[str, ...], priced: Callable[[Option], float]
) -> list[tuple[Option, ...]]:
    """Return the best options of the layers of a unit, for each tie that all of them offer."""
    if len(unit) == 1:
        return [(min(problem.layers[unit[0]], key=priced),)]
    ties = set.intersection(*({o.tie for o in problem.layers[name]} for name in unit))
    return [
        tuple(min((o for o in problem.layers[n] if o.tie == tie), key=priced) for n in unit)
        for tie in sorted(ties)
    ]


def _filled(problem: Problem, choice: Choice) -> Choice:
    """Spend what is left of the budgets: again and again on what gains most for its amount."""
    filled = dict(choice)
    left = [b.limit - a for b, a in zip(problem.budgets, problem.amounts(choice), strict=True)]
    while True:
        best_gain, best = 0.0, None
        for name, current in filled.items():
            for option in problem.layers[name]:
                gain = current.cost - option.cost
                if gain <= 0 or option.tie != current.tie:
                    continue
                more = [a - b for a, b in zip(option.amounts, current.amounts, strict=True)]
                if any(m > max(rest, 0.0) for m, rest in zip(more, left, strict=True)):
                    continue
                spent = sum(
                    max(m, 0.0) / (abs(budget.limit) or 1.0)
                    for m, budget in zip(more, problem.budgets, strict=True)
                )
                rate = gain / max(spent, 1e-12)
                if rate > best_gain:
                    best_gain, best = rate, (name, option, more)
        if best is None:
            return filled
        name, filled[name], more = best
        left = [rest - m for rest, m in zip(left, more, strict=True)]
