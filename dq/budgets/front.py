"""Bytes against quality: what the programme predicts, and what comes out."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dq.calls import Call, run
from dq.errors import DQError
from dq.full_precision import as_float32
from dq.presets import FLOAT
from dq.progress import track
from dq.sensitivity.bits import Bits, Limits, allocate
from dq.sensitivity.heldout import output_noise, simulated
from dq.sensitivity.probe import Probe
from dq.sensitivity.table import Table

__all__ = ["Point", "Trial", "front", "random_bits", "uniform_bits"]


@dataclass(frozen=True)
class Point:
    """One choice of formats.

    Attributes:
        name: In words.
        bits: Average bits a weight, scales included.
        bytes: Of all candidate layers.
        predicted: Relative noise power of the output: the sum over the layers.
        real: The same as it comes out, on calls that nothing was measured on.
        choice: The formats, (weight, input) by layer.
    """

    name: str
    bits: float
    bytes: int
    predicted: float
    real: float
    choice: Bits


class Trial:
    """Tries out choices of formats on some calls.

    Args:
        table: Predicts.
        probe: What the table was found with.
        calls: To try on, in float32.
    """

    def __init__(self, table: Table, probe: Probe, calls: Sequence[Call]) -> None:
        self.table = table
        self.probe = probe
        self.calls = calls
        self.references: list[Tensor] = []

    @torch.no_grad()
    def point(self, name: str, choice: Bits) -> Point:
        """Return what a choice promises and keeps."""
        model, candidates = self.probe.model, self.probe.candidates
        size = sum(candidates.bytes(layer, *pair) for layer, pair in choice.items())
        with as_float32(model):
            if not self.references:
                self.references = [run(model, c) for c in self.calls]
            with simulated(self.probe, choice):
                real = output_noise(model, self.calls, self.references)
        predicted = self.table.noise(choice)
        return Point(name, 8 * size / candidates.weight_count, size, predicted, real, choice)


def front(trial: Trial, bits: Sequence[float], float_share: float) -> list[Point]:
    """Return the best choice for each of some average numbers of bits a weight.

    Numbers that no choice can keep are left out.
    """
    candidates = trial.probe.candidates
    share = float_share if candidates.inputs else 1.0
    points = []
    for each in track(bits, "allocating"):
        try:
            limits = Limits(each * candidates.weight_count / 8, share)
            choice = allocate(trial.table, candidates, limits)
        except DQError:
            continue
        points.append(trial.point(f"{each:g} bits", choice))
    return points


def uniform_bits(trial: Trial, weight: str, widest: str, wide: Sequence[str]) -> Bits:
    """Return the choice that gives all layers the same formats.

    Args:
        trial: Knows the candidates.
        weight: Format of the weights.
        widest: Format of weights whose layer the first does not fit, or whose role is in `wide`.
        wide: Roles.
    """
    candidates = trial.probe.candidates
    input = next(iter(candidates.inputs), FLOAT)
    return {
        name: (
            weight if weight in formats and candidates.roles[name] not in wide else widest, input
        )
        for name, formats in candidates.weights.items()
    }  # fmt: skip


def random_bits(trial: Trial, seed: int) -> Bits:
    """Return a random choice: formats drawn with odds that are random themselves.

    With even odds, all choices of many layers would make the same noise.
    """
    draw = random.Random(seed)
    candidates = trial.probe.candidates
    odds = {name: draw.random() ** 4 for table in candidates.weights.values() for name in table}
    input_odds = {name: draw.random() ** 4 for name in (*candidates.inputs, FLOAT)}
    return {
        layer: _drawn(draw, table, odds, input_odds) for layer, table in candidates.weights.items()
    }


def _drawn(
    draw: random.Random,
    weights: Mapping[str, object],
    odds: Mapping[str, float],
    input_odds: Mapping[str, float],
) -> tuple[str, str]:
    names = list(weights)
    weight = draw.choices(names, [odds[name] for name in names])[0]
    return weight, draw.choices(list(input_odds), list(input_odds.values()))[0]
