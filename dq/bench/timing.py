"""Fair timing: everything that is compared runs once in every round, in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dq.progress import track

__all__ = ["Times", "interleave", "threads_set"]

_WARMUP = 2  # rounds that do not count: the first packs weights, the second sees warm buffers


@dataclass(frozen=True)
class Times:
    """What one competitor took, round by round, in seconds.

    Args:
        wall: On the clock.
        cpu: Of the process, all threads together.
    """

    wall: tuple[float, ...]
    cpu: tuple[float, ...]

    @property
    def milliseconds(self) -> float:
        """Median on the clock."""
        return statistics.median(self.wall) * 1e3

    @property
    def cpu_milliseconds(self) -> float:
        """Median of the process's time; on a busy machine it is the steadier one."""
        return statistics.median(self.cpu) * 1e3

    @property
    def spread(self) -> float:
        """Distance of the quartiles on the clock, milliseconds; 0 for a single round."""
        if len(self.wall) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.wall, n=4, method="inclusive")
        return (high - low) * 1e3


def interleave(
    runs: Mapping[str, Callable[[], object]], rounds: int, title: str | None = None
) -> dict[str, Times]:
    """Time all runs, each once in every round, so that a slow minute slows all of them.

    Args:
        runs: What to call, by name.
        rounds: How often.
        title: Words in front of the progress bar; None for none.
    """
    for run in list(runs.values()) * _WARMUP:
        run()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(rounds) if title is None else track(range(rounds), title):
        for name, run in runs.items():
            taken[name].append(_time(run))
    return {name: Times(*zip(*pairs, strict=True)) for name, pairs in taken.items()}


def _time(run: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


@contextmanager
def threads_set(count: int) -> Iterator[None]:
    """While active, torch computes with `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
