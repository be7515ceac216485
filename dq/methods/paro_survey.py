"""What PAROAttention asks of a model: which attentions it has, and what is in their maps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dq import attention
from dq.errors import DQError
from dq.family import Role
from dq.full_precision import full_precision
from dq.method import Job
from dq.nn.steps import noted
from dq.tokens.layout import TokenLayout
from dq.tokens.statistics import BlockStatistics

__all__ = ["ordered_sites", "statistics"]


def ordered_sites(job: Job, skipped: int = 0) -> dict[str, TokenLayout]:
    """Return the attentions whose queries and keys are the same tokens, and where these lie.

    Args:
        job: Whose model, and calls.
        skipped: How many of the first ones are left out.

    Raises:
        DQError: If there are none.
    """
    known = attention.sites(job.model)
    call = next(call for calls in job.calibration.batches() for call in calls)
    layouts = {layout.tokens: layout for layout in job.family.layouts(job.model, call)}
    seen: dict[str, tuple[int, int]] = {}

    def see(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        seen[name] = q.shape[2], k.shape[2]

    with full_precision(job.model), attention.tapped(job.model, known, see):
        next(iter(job.calibration.replay([call])))
    roles = job.family.roles(job.model)
    crossed = {n for n in known if roles.get(f"{n}.to_q") is Role.CROSS_ATTENTION}
    # A prompt may have as many tokens as the image.
    alike = (n for n, (q, k) in seen.items() if q == k and q in layouts and n not in crossed)
    sites = dict([(name, layouts[seen[name][0]]) for name in alike][skipped:])
    if not sites:
        raise DQError(
            f"paro: no attention of this {type(job.model).__name__} has tokens that form a grid, "
            f"of {len(known)} that can be changed; leave the step out"
        )
    return sites


def statistics(
    job: Job, found: Mapping[str, BlockStatistics], groups: tuple[float, ...], maps: int
) -> None:
    """Let statistics take in maps of all captured calls, which full precision computes again.

    Args:
        job: Whose model, and calls.
        found: By attention.
        groups: Timesteps of the step groups; none for one.
        maps: Rows of a call whose maps are looked at, spread over it.
    """
    with full_precision(job.model), noted(job.model) as steps:

        def see(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
            rows = torch.linspace(0, len(q) - 1, min(maps, len(q))).long().unique()
            group = steps.nearest(groups) if groups else 0
            for row in rows.tolist():
                mine = group if isinstance(group, int) else int(group[row])
                found[name].add(q[row : row + 1], k[row : row + 1], scale, mine)

        with attention.tapped(job.model, found, see):
            for calls in job.calibration.batches():
                for _ in job.calibration.replay(calls):
                    pass
