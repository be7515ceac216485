"""The begin-of-sentence token of CLIP prompts, computed apart (MixDQ, Zhao et al. 2024).

See `dq.nn.kept` for what it is about and what happens at run time. Only static inputs need it: with
a scale a token, the one that stands out has its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from dq.family import Role
from dq.method import Job, Method, methods
from dq.nn.kept import KNOWN, kinds
from dq.plan import LayerSpec, Plan

__all__ = ["BOS", "Kept", "find_kept", "keep"]


class Kept(NamedTuple):
    """What was found out about the first token of the calibration's prompts.

    Attributes:
        every: Tokens of a prompt, of which the first is always the same; 0 if it is not.
        why_not: One sentence in that case, else empty.
    """

    every: int
    why_not: str = ""


def find_kept(job: Job) -> Kept:
    """Look at the prompts that calibration has captured.

    Raises:
        NeedsData: If nothing makes the denoiser run.
    """
    argument = job.family.prompt(job.model)
    if Role.CROSS_KV not in job.family.roles(job.model).values() or not argument:
        return Kept(0, "no cross-attention to prompts of CLIP: no begin-of-sentence token to keep")
    known: Tensor | None = None
    every = 0
    for calls in job.calibration.batches():
        for call in calls:
            prompt = call.get(argument)
            if not isinstance(prompt, Tensor):
                return Kept(0, f"{argument} is not one tensor: no token is kept")
            tokens = prompt[:, 0][prompt[:, 0].any(1)]
            if len(tokens) and known is None:
                known, every = tokens[0], prompt.shape[1]
            if known is not None and bool((kinds(tokens, known) != KNOWN).any()):
                return Kept(0, "prompts begin with different vectors: no token is kept")
    if known is None:
        return Kept(0, "every prompt of the calibration is zero: no token is kept")
    return Kept(every)


def keep(
    layers: Mapping[str, LayerSpec], roles: Mapping[str, Role], every: int
) -> dict[str, LayerSpec]:
    """Return the layers; the static ones that see prompts keep the first of `every` tokens."""
    return {
        name: dataclasses.replace(spec, kept_every=every)
        if spec.is_static and spec.transform is None and roles[name] is Role.CROSS_KV
        else spec
        for name, spec in layers.items()
    }


@methods.register("bos")
@dataclass(frozen=True)
class BOS(Method):
    """Keep the begin-of-sentence token of prompts out of static quantization."""

    def decide(self, job: Job) -> Plan:
        """Mark the layers that see prompts; see `Method.decide`."""
        roles = job.family.roles(job.model)
        if keep(job.plan.layers, roles, 1) == job.plan.layers:
            return job.plan  # none of them is static: nothing to look for, and no data needed
        found = find_kept(job)
        if found.why_not:
            notes = {**job.plan.notes, job.plan.model: found.why_not}
            return dataclasses.replace(job.plan, notes=notes)
        return dataclasses.replace(job.plan, layers=keep(job.plan.layers, roles, found.every))
