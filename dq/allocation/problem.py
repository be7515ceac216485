"""What is to be decided: one option for each layer, at the least cost, within budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dq.errors import DQError

__all__ = ["Budget", "Choice", "Option", "Problem"]


@dataclass(frozen=True)
class Option:
    """What one layer may become.

    Args:
        name: How it is called, e.g. "int4|int8".
        cost: What it adds to the objective.
        amounts: What it takes of each budget, in their order.
        tie: Layers that are tied take options of the same tie.
    """

    name: str
    cost: float
    amounts: tuple[float, ...] = ()
    tie: str = ""


@dataclass(frozen=True)
class Budget:
    """A limit on the sum of what options take.

    Args:
        name: What is limited, with its unit, e.g. "bytes".
        limit: The largest sum allowed.
    """

    name: str
    limit: float


Choice = dict[str, Option]


@dataclass(frozen=True)
class Problem:
    """A one-of-each programme: min sum of costs, one option a layer, within all budgets.

    Args:
        layers: Options by layer.
        budgets: Limits.
        ties: Groups of layers that must take options of the same tie.
    """

    layers: Mapping[str, tuple[Option, ...]]
    budgets: tuple[Budget, ...] = ()
    ties: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        for name, options in self.layers.items():
            if not options:
                raise DQError(f"{name} has no option left; allow it one")
            for option in options:
                if len(option.amounts) != len(self.budgets):
                    raise DQError(f"{name}: option {option.name} does not say what it takes")
        tied = [name for group in self.ties for name in group]
        if len(tied) != len(set(tied)):
            raise DQError("a layer is tied twice; join the groups")
        for name in tied:
            if name not in self.layers:
                raise DQError(f"{name} is tied and has no options")

    def units(self) -> list[tuple[str, ...]]:
        """Return the layers that are decided together: tied groups, and each other layer alone."""
        tied = {name for group in self.ties for name in group}
        return [*self.ties, *((name,) for name in self.layers if name not in tied)]

    def cost(self, choice: Choice) -> float:
        """Return the objective of a choice."""
        return sum(option.cost for option in choice.values())

    def amounts(self, choice: Choice) -> tuple[float, ...]:
        """Return what a choice takes of each budget."""
        return tuple(
            sum(option.amounts[index] for option in choice.values())
            for index in range(len(self.budgets))
        )

    def is_feasible(self, choice: Choice) -> bool:
        """Whether a choice keeps all budgets and ties."""
        kept = all(
            amount <= budget.limit * (1 + 1e-9)
            for amount, budget in zip(self.amounts(choice), self.budgets, strict=True)
        )
        return kept and all(len({choice[n].tie for n in group}) == 1 for group in self.ties)
