"""Orders of tokens and block masks for every self-attention.

PAROAttention (Zhao et al. 2025, arXiv 2506.16054): each head's tokens are put in the order that
gathers its large probabilities in few blocks, and the others are left out, by masks that are found
once. The calibration of the paper is not public; what differs here is in docs/paro.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dq.attention_spec import AttentionSpec
from dq.errors import DQError, unknown
from dq.method import Job, Method, methods
from dq.methods.paro_survey import ordered_sites, statistics
from dq.methods.step_groups import captured_times, centres
from dq.plan import Plan
from dq.presets import FLOAT
from dq.spec import Granularity, TensorSpec
from dq.tokens.choice import RULES, Chosen, in_orders, paper_score
from dq.tokens.layout import TokenLayout
from dq.tokens.orders import candidates, natural
from dq.tokens.spec import TokenSpec
from dq.tokens.statistics import BlockStatistics

__all__ = ["PARO"]

_CRITERIA = ("mass", "paper")
_ORDERS = ("axes", "tiles", "natural")


@methods.register("paro")
@dataclass(frozen=True)
class PARO(Method):
    """Order the tokens of every self-attention, and compute a share of its blocks.

    Args:
        density: Share of the blocks of all maps that is computed; 1 for all of them.
        block: Queries and keys of a block, one or two numbers.
        orders: What heads choose from: "axes" in any order; "tiles" too, an extension beyond the
            paper; or only what is "natural" to the model.
        criterion: What an order is judged by: "mass" that the mask keeps, or the score of the
            "paper"; see `dq.tokens.choice`.
        alpha: Weight of sparsity in that score.
        rule: How blocks are chosen: by one "threshold" for all heads, or the "top" of each map.
        groups: Of denoising steps with masks of their own; 0 for those of the paper, a group for
            each of the first half of the calibration's steps and one for the rest.
        query_key: Format of q and k, with a scale a block, or "float".
        value: Format of v, likewise.
        probabilities: Format of probabilities, unsigned or floating point, or "float", as `value`.
        maps: Rows of a call whose maps are looked at.
        dense: How many attentions, the first of the model, are left whole.
    """

    density: float = 0.5
    block: tuple[int, ...] = (64,)
    orders: str = "axes"
    criterion: str = "mass"
    alpha: float = 0.5
    rule: str = "threshold"
    groups: int = 0
    query_key: str = FLOAT
    value: str = FLOAT
    probabilities: str = FLOAT
    maps: int = 16
    dense: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise DQError(f"density is a share of the blocks, above 0 and up to 1: {self.density}")
        for name, known in (("orders", _ORDERS), ("criterion", _CRITERIA), ("rule", [*RULES])):
            if getattr(self, name) not in known:
                raise unknown(f"value of {name}", getattr(self, name), known)
        if len(self.block) not in (1, 2):
            raise DQError(f"block is the queries and keys of a block, or one number: {self.block}")
        self.spec(TokenSpec(TokenLayout((1, 1)), 1, ("hw",), self.size), None)  # checks these
        if not 0 <= self.alpha <= 1:
            raise DQError(f"alpha is 0 to 1, not {self.alpha}")
        for name, least in (("groups", 0), ("maps", 1), ("dense", 0)):
            if getattr(self, name) < least:
                raise DQError(f"{name} is {least} or more, not {getattr(self, name)}")

    def spec(self, tokens: TokenSpec, before: AttentionSpec | None) -> AttentionSpec:
        """Return what an attention becomes; formats that an earlier step has chosen stay."""
        names = (self.query_key, self.value, self.probabilities)
        block = Granularity("block")
        q, v, p = (None if n == FLOAT else TensorSpec(n, block, dynamic=True) for n in names)
        if before is not None and q is v is None:
            return dataclasses.replace(before, tokens=tokens)
        return AttentionSpec(q, v, p, tokens)

    @property
    def size(self) -> tuple[int, int]:
        """Queries and keys of a block."""
        return self.block[0], self.block[-1]

    def decide(self, job: Job) -> Plan:
        """Find orders and masks; see `Method.decide`.

        Raises:
            DQError: If no attention of the model has tokens that form a grid.
            NeedsData: If nothing makes the denoiser run.
        """
        sites = ordered_sites(job, self.dense)
        times = captured_times(job.model, job.calibration)
        groups = self._groups(times)
        stage = job.calibration.stage("paro")
        stored = job.calibration.work.load(stage, job.calibration.device)
        if stored is None:
            found = {
                name: BlockStatistics(
                    layout,
                    self._candidates(layout),
                    self.size,
                    max(1, len(groups)),
                    self.criterion == "paper",
                )
                for name, layout in sites.items()
            }
            statistics(job, found, groups, self.maps)
            stored = self._chosen(sites, found)
            job.calibration.work.save(stage, stored)
        plan = dict(job.plan.attention)
        for name, layout in sites.items():
            chosen = Chosen(stored[f"{name}.orders"], stored[f"{name}.masks"].bool())
            heads = len(chosen.orders)
            spec = TokenSpec(layout, heads, self._candidates(layout), self.size, groups)
            job.tokens[name] = chosen
            plan[name] = self.spec(spec, plan.get(name))
        return dataclasses.replace(job.plan, attention=plan, notes=self._notes(job, sites, stored))

    def _candidates(self, layout: TokenLayout) -> tuple[str, ...]:
        if self.orders == "natural":
            return (natural(layout.grid),)
        return candidates(layout.grid, self.orders == "tiles")

    def _groups(self, times: tuple[float, ...]) -> tuple[float, ...]:
        """Return the timesteps of the groups, ascending; none for a single one."""
        if self.groups == 1 or len(times) == 1 or self.density == 1:
            return ()
        if self.groups:
            return centres(times, self.groups)
        half = len(times) // 2  # timesteps fall: the first half of the steps are the larger ones
        rest = times[: len(times) - half]
        return (float(sum(rest) / len(rest)), *times[len(times) - half :])

    def _chosen(
        self, sites: Mapping[str, TokenLayout], found: dict[str, BlockStatistics]
    ) -> dict[str, Tensor]:
        """Return orders and masks of all attentions, by name; lets go of what was found."""
        judged: dict[str, Tensor] = {}
        sums, forced = [], []
        for name, layout in sites.items():
            mine = found.pop(name)  # all of them are most of the memory
            blocks = {o: mine.blocks(o) for o in self._candidates(layout)}
            every = torch.stack([b.sums for b in blocks.values()])  # (orders, G, H, q, k)
            if self.criterion == "paper":
                elements = self.size[0] * self.size[1]
                judged[name] = paper_score(blocks, elements, self.alpha).argmin(0)
                every = in_orders(every, judged[name])[None]  # nothing is left to choose from
            sums.append(every)
            forced.append(_diagonal(*every.shape[-2:]).to(every.device))
        chosen = RULES[self.rule](sums, forced, self._of_image(sites))
        stored = {}
        for name, (orders, masks) in zip(sites, chosen, strict=True):
            stored[f"{name}.orders"] = judged.get(name, orders).to(torch.uint8)
            stored[f"{name}.masks"] = masks.to(torch.uint8)
        return stored

    def _of_image(self, sites: Mapping[str, TokenLayout]) -> float:
        """Return the density of the image's blocks alone: those of text are computed anyway."""
        image = every = 0
        for layout in sites.values():
            spec = TokenSpec(layout, 1, self._candidates(layout), self.size)
            queries, keys = spec.image_blocks
            all_queries, all_keys = spec.blocks
            image, every = image + queries * keys, every + all_queries * all_keys
        return max(0.0, (self.density * every - (every - image)) / image)

    def _notes(
        self, job: Job, sites: Mapping[str, TokenLayout], stored: Mapping[str, Tensor]
    ) -> dict[str, str]:
        """Say what has been found."""
        names: dict[str, int] = {}
        for name, layout in sites.items():
            for order in stored[f"{name}.orders"].tolist():
                word = self._candidates(layout)[order]
                names[word] = names.get(word, 0) + 1
        kept = sum(int(stored[f"{name}.masks"].sum()) for name in sites)
        every = sum(stored[f"{name}.masks"].numel() for name in sites)
        words = ", ".join(f"{count} {word}" for word, count in sorted(names.items()))
        share = f"{100 * kept / every:.0f} % of the image's blocks"
        others = sum(hasattr(module, "processor") for module in job.model.modules()) - len(sites)
        left = f"; {others} other attentions are left as they are" if others else ""
        said = f"{len(sites)} attentions, {share}; orders of heads: {words}{left}"
        return {**job.plan.notes, "paro": said}


def _diagonal(queries: int, keys: int) -> Tensor:
    """Return which blocks hold a token that meets itself, `(q, k)` bool: no row is without one."""
    unit = max(queries, keys)
    row = torch.arange(unit) * queries // unit
    column = torch.arange(unit) * keys // unit
    found = torch.zeros(queries, keys, dtype=torch.bool)
    found[row, column] = True
    return found
