"""QuEST: selective finetuning of a quantized denoiser (Wang et al. 2024, arXiv 2402.03666).

The few layers that matter most learn to make up for what quantization does, with the network in
full precision for a teacher: `dq.tuning.distill` has the loss. The scales of inputs learn with
them, and unlike in the paper those of all weights, a number an output channel. Recipes by name are
in `dq.methods.quest_recipes`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from dq.errors import DQError, unknown
from dq.family import Role, check_roles
from dq.method import Job, methods
from dq.methods.finetuning import BLOCKS, Finetuning, layers_of, share, static_inputs
from dq.nn import Quantizer, QuantLayer
from dq.nn.latent import FullWeight, LowRankWeight
from dq.plan import Plan, check_whole
from dq.quantize import dequantize
from dq.rounding.cells import within_cells
from dq.tuning.align import align
from dq.tuning.distill import Distance, Distillation
from dq.tuning.loop import Group, Schedule, tune
from dq.tuning.topkld import topkld

__all__ = ["PAPER_CRITICAL", "QuEST"]

logger = logging.getLogger(__name__)

_LOSSES = ("mse", "topkld")
_STARTS = ("levels", "cells")
PAPER_CRITICAL = (
    Role.FEED_FORWARD,
    Role.SELF_ATTENTION,
    Role.CROSS_ATTENTION,
    Role.CROSS_KV,
)
_ALIGNING = 200  # steps of each layer of time, before it learns with the others


@methods.register("quest")
@dataclass(frozen=True)
class QuEST(Finetuning):
    """Learn the weights that matter most, and scales.

    Args:
        critical: Roles whose weights and biases are learned; those that the model lacks are left
            out, but not all of them. Everything in the blocks by default; the paper has attention
            and feed-forwards (`PAPER_CRITICAL`), which are all there is in a transformer. Empty for
            scales alone.
        time: Whether the quantized layers of time learn too, first alone, then with the others.
        start: Where weights begin that a step before has rounded, e.g. GPTQ. "levels": on those of
            their codes, so that only what is pushed the same way again and again goes over to the
            next, and noise of the gradient does not undo what was found. "cells": where they lay
            between two levels, as in the paper, see `dq.rounding.cells`.
        drift: Learning rate of weights, in levels of their grid over all steps together.
        scale_rate: Learning rate of the logarithms of the scales of static inputs.
        weight_scale_rate: Of those of the weights of all quantized layers; 0 leaves them.
        local_weight: Of the sum of the critical layers' own losses; 1 in the paper. They are some
            hundred times as large as the output's, see docs/quest.md for what they do.
        global_weight: Of the loss of the network's output.
        loss: Of the output: "mse", or "topkld" for models that predict tokens, experimental; see
            `dq.tuning.topkld`.
        top_tokens: How many tokens count as likely ones there.
        rank: 0 learns every weight of a layer; else a product of this rank, merged at the end.

    The other arguments are those of `dq.methods.finetuning`.
    """

    critical: tuple[str, ...] = BLOCKS
    time: bool = False
    start: str = "levels"
    drift: float = 4.0
    scale_rate: float = 1e-3
    weight_scale_rate: float = 1e-3
    local_weight: float = 0.0
    global_weight: float = 2.0
    loss: str = "mse"
    top_tokens: int = 64
    rank: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("loss", _LOSSES), ("start", _STARTS)):
            if getattr(self, name) not in known:
                raise unknown(f"value of {name}", getattr(self, name), known)
        check_roles(self.critical)
        for name in ("drift", "scale_rate", "weight_scale_rate", "local_weight", "global_weight"):
            if getattr(self, name) < 0:
                raise DQError(f"{name} is 0 or more, not {getattr(self, name)}")
        if self.rank < 0 or self.top_tokens < 1:
            raise DQError("rank is 0 or more, top_tokens 1 or more")
        if not self.local_weight and not self.global_weight:
            raise DQError("local_weight and global_weight are both 0: nothing would be learned")

    def decide(self, job: Job) -> Plan:
        """Leave the plan as it is; see `Method.decide`.

        Raises:
            DQError: If it has layers with salient channels, which learn under binarydm only.
        """
        split = [name for name, spec in job.plan.layers.items() if spec.salient is not None]
        if split:
            raise DQError(
                f"quest: {split[0]} has salient channels, whose two formats do not learn further; "
                "leave salient of binarydm or quest out"
            )
        return job.plan

    def learn(self, job: Job) -> None:
        """See `Finetuning.learn`."""
        distance = self._distance(job)  # says it first if there is none
        samples = self.samples(job.calibration)
        chosen = layers_of(job, (*self.critical, *((Role.TIME,) if self.time else ())))
        groups: dict[str, list[Group]] = {}

        def start(name: str) -> list[Group]:
            groups[name] = self._layer(job, name)
            return groups[name]

        roles = job.family.roles(job.model)
        time = [name for name in chosen if roles[name] is Role.TIME]
        if time:
            schedule = Schedule(_ALIGNING, self.batch, seed=job.calibration.spec.seed)
            rows = samples.shuffled(schedule.seed)[:64]
            align(job.model, time, start, samples.batch(rows), schedule)
        for name in chosen:
            if name not in groups:
                start(name)
        learned = sum(p.numel() for mine in groups.values() for g in mine for p in g.parameters)
        words = share(job.model, learned)
        logger.info("quest: %s, of %s", words, ", ".join(groups))
        everything = [group for mine in groups.values() for group in mine]
        everything += self._scales(job.model)
        losses = Distillation(
            job.model, chosen, self.local_weight, self.global_weight, distance, self.autocast
        )
        found = tune(
            everything,
            losses,
            samples,
            self.samples(self.others(job)),
            self.schedule(job),
            job.calibration.work,
            job.calibration.stage("quest"),
        )
        for module in job.model.modules():
            if isinstance(module, Quantizer):
                module.settle()
        self.report(job, "quest", words, found)

    def _distance(self, job: Job) -> Distance:
        """Return the distance between two outputs."""
        if self.loss == "mse":
            return F.mse_loss
        axis = job.family.logits_axis
        if axis is None:
            raise DQError(
                f"loss is topkld, which compares logits over tokens, and a "
                f"{type(job.model).__name__} has none: use mse"
            )
        return lambda student, teacher: topkld(
            teacher.movedim(axis, -1), student.movedim(axis, -1), self.top_tokens
        )

    def _layer(self, job: Job, name: str) -> list[Group]:
        """Make weight and bias of a layer learnable."""
        layer = job.model.get_submodule(name)
        assert isinstance(layer, QuantLayer)  # it was chosen among them
        check_whole(layer.spec)
        matrix = self._first(layer)
        scales, layer.codes = layer.weight_quantizer.scales, None
        bias = layer.changed_bias()
        if bias is not None:
            layer.latent_bias = nn.Parameter(bias.detach().float().clone())
        # A weight must not leave its level by noise alone (EfficientDM's scale-aware rate).
        steps = scales.step.expand(len(matrix), -1)
        alive = matrix.abs().amax(1) > 0  # others have a scale that says nothing
        rate = self.drift * float(steps[alive].mean() if alive.any() else 0.0) / self.steps
        biases = [] if layer.latent_bias is None else [Group([layer.latent_bias], rate)]
        if not self.rank:
            layer.latent = FullWeight(matrix)
            return [Group([*layer.latent.parameters()], rate), *biases]
        layer.latent = LowRankWeight(matrix, self.rank, job.generator)
        # A product of such factors moves by so much less than they do.
        faster = rate * (matrix.shape[1] / self.rank) ** 0.5
        return [Group([*layer.latent.parameters()], faster), *biases]

    def _first(self, layer: QuantLayer) -> Tensor:
        """Return the matrix that a layer's weight begins with; its nearest levels are its codes."""
        matrix, spec = layer.matrix().detach(), layer.spec.weight
        scales, codes = layer.weight_quantizer.scales, layer.codes
        if codes is None:
            return matrix
        if self.start == "cells":
            return within_cells(matrix, codes, scales, spec)
        return dequantize(codes, scales, spec)

    def _scales(self, model: nn.Module) -> list[Group]:
        """Make the scales of static inputs and of weights learnable."""
        layers = [m for m in model.modules() if isinstance(m, QuantLayer)]
        static = static_inputs(model)
        # Formats whose scales are powers of two have no other: other libraries read only those.
        weights = [m.weight_quantizer for m in layers if m.spec.weight.scale_format != "e8m0"]
        groups = []
        for quantizers, rate in ((static, self.scale_rate), (weights, self.weight_scale_rate)):
            if quantizers and rate:
                groups.append(Group([q.learn() for q in quantizers], rate))
        return groups
