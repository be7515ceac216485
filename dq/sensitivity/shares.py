"""Stages of a job that several processes take in turn."""

from __future__ import annotations

from collections.abc import Callable

from accelerate import PartialState
from torch import Tensor

from dq.errors import DQError
from dq.progress import track
from dq.work import Work

__all__ = ["shared"]


def shared(
    work: Work, name: str, count: int, make: Callable[[int], dict[str, Tensor]], title: str
) -> list[dict[str, Tensor]]:
    """Return all stages of a job; under `accelerate launch` each process makes its share.

    Args:
        work: Where finished stages are kept; the same folder for all processes.
        name: Of the stages.
        count: How many there are.
        make: Makes one, by number.
        title: For the progress bar.

    Raises:
        DQError: If the stages of another process cannot be seen.
    """
    state = PartialState()
    mine: dict[int, dict[str, Tensor]] = {}
    for index in track(range(count)[state.process_index :: state.num_processes], title):
        stage = f"{name}-{index:04}"
        known = work.load(stage)
        if known is None:
            known = make(index)
            work.save(stage, known)
        mine[index] = known
    state.wait_for_everyone()
    found = [mine.get(index) or work.load(f"{name}-{index:04}") for index in range(count)]
    if any(stage is None for stage in found):
        raise DQError(
            "what another process has measured is missing: all processes must share the cache "
            "folder, see XDG_CACHE_HOME"
        )
    return [stage for stage in found if stage is not None]
