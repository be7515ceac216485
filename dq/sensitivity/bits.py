"""From a table to a choice of formats: the programme of MixDQ in both of its forms."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from dq.allocation import Budget, Option, Problem, solve
from dq.errors import DQError, unknown
from dq.plan import match
from dq.presets import FLOAT
from dq.sensitivity.candidates import Candidates
from dq.sensitivity.table import CONTENT, QUALITY, Row, Table, decibels

__all__ = ["Bits", "Limits", "allocate", "allocate_paper"]

Bits = dict[str, tuple[str, str]]  # (weight format, input format) by layer

_SPLITS = tuple(0.46 + 0.1 * index for index in range(10))  # content's bits over quality's


@dataclass(frozen=True)
class Limits:
    """What an allocation may take.

    Args:
        bytes: Of all candidate layers, scales included, biases not.
        float_share: Share of all multiply-adds that may have float inputs.
        seconds: Sum of the layers' times; None for no limit. The table must have measured them.
        forced: Layer pattern to "weight|input": layers that have no choice.
    """

    bytes: float
    float_share: float = 1.0
    seconds: float | None = None
    forced: Mapping[str, str] = dataclasses.field(default_factory=dict)


def allocate(table: Table, candidates: Candidates, limits: Limits, quality: float = 1.0) -> Bits:
    """Choose formats so that the sum of noise is smallest.

    Layers that see the same input take the same input format.

    Args:
        table: Noise by layer and format.
        candidates: The same that the table was found for.
        limits: What the choice may take.
        quality: How much more the noise of the quality group weighs than that of content.

    Returns:
        Formats by layer.

    Raises:
        DQError: If nothing keeps the limits; says what would be possible.
    """
    weights = {CONTENT: 1.0, QUALITY: quality}

    def cost(row: Row, weight: str, input: str) -> float:
        return weights[row.group] * row.noise(weight, input)

    problem = _problem(table.rows, candidates, limits, cost, table.sharing)
    return _names(solve(problem))


def allocate_paper(table: Table, candidates: Candidates, limits: Limits) -> list[Bits]:
    """Choose formats as the paper does, for several splits of the budget between the groups.

    Each group maximizes the sum of its scores for itself: decibels, or SSIM in the content group if
    the table has it. Content has k times the bits a weight that quality has, for ten k from 0.46 to
    1.36; splits that a group cannot keep are left out (MixDQ's published search, as it behaves).

    Args:
        table: Scores by layer and format.
        candidates: The same that the table was found for.
        limits: What each choice may take in all.

    Returns:
        One choice a split that is possible.

    Raises:
        DQError: If no split is.
    """
    groups = {name: [row for row in table.rows if row.group == name] for name in (CONTENT, QUALITY)}
    size = {name: sum(_weights(row) for row in rows) for name, rows in groups.items()}
    found: list[Bits] = []
    error: DQError | None = None
    for split in _SPLITS:
        each = limits.bytes / (split * size[CONTENT] + size[QUALITY])
        shares = {CONTENT: split * each * size[CONTENT], QUALITY: each * size[QUALITY]}
        bits: Bits = {}
        try:
            for name, rows in groups.items():
                mine = dataclasses.replace(limits, bytes=shares[name])
                problem = _problem(rows, candidates, mine, _negative_score, ())
                bits |= _names(solve(problem)) if rows else {}
        except DQError as impossible:
            error = impossible
            continue
        found.append(bits)
    if not found:
        raise error or DQError("the model has no layers to choose formats for")
    return found


def _negative_score(row: Row, weight: str, input: str) -> float:
    """Return minus the sum of what each tensor's quantization alone leaves, in dB or SSIM."""
    total = 0.0
    for kind, name, noise in (("w", weight, row.weight), ("a", input, row.input)):
        if row.content and row.group == CONTENT:
            total -= 1.0 if name == FLOAT else row.content[f"{kind}:{name}"]
        else:
            total -= _CEILING if name == FLOAT else min(decibels(noise[name]), _CEILING)
    return total


_CEILING = 84.0  # dB; more is rounding of the measurement itself


def _weights(row: Row) -> int:
    return row.shape[0] * row.shape[1]


def _problem(
    rows: Sequence[Row],
    candidates: Candidates,
    limits: Limits,
    cost: Callable[[Row, str, str], float],
    sharing: Sequence[tuple[str, ...]],
) -> Problem:
    budgets = [Budget("bytes", limits.bytes)]
    if limits.float_share < 1:
        whole = sum(row.macs for row in rows)
        budgets.append(Budget("multiply-adds on float inputs", limits.float_share * whole))
    if limits.seconds is not None:
        budgets.append(Budget("seconds", limits.seconds))

    def option(row: Row, weight: str, input: str) -> Option:
        amounts = [float(candidates.bytes(row.name, weight, input))]
        if limits.float_share < 1:
            amounts.append(float(row.macs) if input == FLOAT else 0.0)
        if limits.seconds is not None:
            if not row.seconds:
                raise DQError("a limit on seconds needs a table with times: measure them")
            amounts.append(row.seconds[f"{weight}|{input}"])
        return Option(f"{weight}|{input}", cost(row, weight, input), tuple(amounts), input)

    layers = {
        row.name: tuple(option(row, *pair) for pair in candidates.options(row.name)) for row in rows
    }
    return Problem(
        _forced(layers, limits.forced, candidates.shapes), tuple(budgets), tuple(sharing)
    )


def _forced(
    layers: Mapping[str, tuple[Option, ...]], forced: Mapping[str, str], names: Iterable[str]
) -> dict[str, tuple[Option, ...]]:
    """Leave the options that the patterns allow; these may be about layers of the other group."""
    left = dict(layers)
    for pattern, wanted in forced.items():
        for name in layers.keys() & set(match(pattern, names)):
            left[name] = tuple(o for o in left[name] if fnmatch.fnmatchcase(o.name, wanted))
            if not left[name]:
                raise unknown(f"option of {name}", wanted, [o.name for o in layers[name]])
    return left


def _names(choice: Mapping[str, Option]) -> Bits:
    pairs = {name: option.name.split("|") for name, option in choice.items()}
    return {name: (weight, input) for name, (weight, input) in pairs.items()}
