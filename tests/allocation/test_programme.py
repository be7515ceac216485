"""The programme against brute force, and the relaxed form against the programme."""

from __future__ import annotations

import itertools
import math
import random
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dq.allocation import Budget, Choice, Option, Problem, relax, smallest, solve
from dq.errors import DQError

TIES = ("int8", "float")


def problem(
    layers: int, seed: int, bits: float, ties: bool = False, second: bool = False
) -> Problem:
    """Noise that falls by four a bit, sizes over three decades."""
    draw = random.Random(seed)
    options: dict[str, tuple[Option, ...]] = {}
    total = 0.0
    for index in range(layers):
        size, noise = 10 ** draw.uniform(3, 6), 10 ** draw.uniform(-6, -3)
        total += size
        options[f"layer{index}"] = tuple(
            Option(
                f"int{width}|{tie}",
                noise * 4.0**-width * draw.uniform(1, 1.3) + (1e-3 * noise if tie == "int8" else 0),
                (size * width / 8, *((size * (tie == "float"),) if second else ())),
                tie,
            )
            for width in (2, 4, 8)
            for tie in (TIES if second else TIES[:1])
        )
    budgets = [Budget("bytes", total * bits / 8)]
    if second:
        budgets.append(Budget("multiply-adds", 0.2 * total))
    groups = [(f"layer{i}", f"layer{i + 1}") for i in range(0, layers - 1, 3)] if ties else []
    return Problem(options, tuple(budgets), tuple(groups))


def brute(one: Problem) -> float:
    """The least cost, by trying everything."""
    best = math.inf
    for picked in itertools.product(*one.layers.values()):
        choice: Choice = dict(zip(one.layers, picked, strict=True))
        if one.is_feasible(choice):
            best = min(best, one.cost(choice))
    return best


@given(
    seed=st.integers(0, 10_000),
    bits=st.floats(2.05, 8.5),
    ties=st.booleans(),
    second=st.booleans(),
)
def test_it_finds_the_best_choice(seed: int, bits: float, ties: bool, second: bool) -> None:
    one = problem(4, seed, bits, ties, second)
    expected = brute(one)
    if expected == math.inf:
        with pytest.raises(DQError, match="no choice of formats keeps the budgets"):
            solve(one)
        return
    choice = solve(one)
    assert one.is_feasible(choice)
    assert one.cost(choice) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bits", [2.5, 3.3, 4.0, 5.0, 7.9])
@pytest.mark.parametrize("second", [False, True])
def test_prices_come_within_a_tenth_of_a_decibel(bits: float, second: bool) -> None:
    one = problem(150, 1, bits, ties=second, second=second)
    relaxed = relax(one)
    assert relaxed is not None
    assert one.is_feasible(relaxed)
    lost = 10 * math.log10(one.cost(relaxed) / one.cost(solve(one)))
    assert -1e-3 < lost < 0.1


def test_seven_hundred_and_ninety_four_layers_take_less_than_five_seconds() -> None:
    draw = random.Random(0)
    options = {}
    for index in range(794):  # the quantized layers of SDXL
        size, noise = 10 ** draw.uniform(3, 7), 10 ** draw.uniform(-7, -3)
        options[f"layer{index}"] = tuple(
            Option(f"int{width}", noise * 4.0**-width * draw.uniform(1, 1.3), (size * width / 8,))
            for width in (2, 3, 4, 5, 6, 8)
        )
    total = sum(table[-1].amounts[0] for table in options.values())
    begin = time.perf_counter()
    choice = solve(Problem(options, (Budget("bytes", total / 2),)))
    assert time.perf_counter() - begin < 5
    assert sum(option.amounts[0] for option in choice.values()) <= total / 2


def test_tied_layers_take_the_same() -> None:
    one = problem(30, 3, 4.0, ties=True, second=True)
    for choice in (solve(one), relax(one)):
        assert choice is not None
        assert all(len({choice[name].tie for name in group}) == 1 for group in one.ties)
        assert len({option.tie for option in choice.values()}) == 2


def test_no_budget_takes_the_cheapest_everywhere() -> None:
    one = problem(5, 0, 4.0)
    free = Problem({n: tuple(Option(o.name, o.cost) for o in t) for n, t in one.layers.items()})
    for choice in (solve(free), relax(free)):
        assert choice is not None
        assert {option.name for option in choice.values()} == {"int8|int8"}


def test_an_impossible_budget_says_what_is_possible() -> None:
    one = problem(10, 0, 1.5)
    least = smallest(one, 0)
    assert least is not None
    assert least == pytest.approx(sum(min(o.amounts[0] for o in t) for t in one.layers.values()))
    with pytest.raises(DQError, match=re.escape(f"{least:,.6g} is possible")):
        solve(one)
    enough = Problem(one.layers, (Budget("bytes", least * (1 + 1e-6)),))
    assert enough.is_feasible(solve(enough))
    assert relax(one) is None


def test_nothing_is_written_to_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    solve(problem(150, 1, 3.3))
    print("after")
    assert capfd.readouterr().out == "after\n"


def test_a_problem_must_make_sense() -> None:
    option = Option("int8", 1.0, (1.0,))
    budget = (Budget("bytes", 10.0),)
    with pytest.raises(DQError, match="conv has no option left"):
        Problem({"conv": ()}, budget)
    with pytest.raises(DQError, match="option int8 does not say what it takes"):
        Problem({"conv": (option,)})
    with pytest.raises(DQError, match="tied twice"):
        Problem({"conv": (option,)}, budget, (("conv",), ("conv",)))
    with pytest.raises(DQError, match="linear is tied and has no options"):
        Problem({"conv": (option,)}, budget, (("conv", "linear"),))
