"""BinaryDM: weights of one bit, learned (Zheng et al. 2025, arXiv 2404.05662).

Binarizers with more than one basis stand in the outer layers, by default only for the first half of
the training; full precision is the teacher of the output and, projected to few directions, of the
features of every block. Recipes by name are in `dq.methods.binarydm_recipes`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dq.binarizers import Binarizer, binarizers
from dq.binarizers.estimators import estimators
from dq.calls import Call, run
from dq.errors import DQError, unknown
from dq.family import check_roles, quantizable
from dq.full_precision import full_precision
from dq.method import Job, methods
from dq.methods.finetuning import BLOCKS, Finetuning, layers_of, share, static_inputs
from dq.nn import Quantizer
from dq.nn.layers import Layer, input_channels
from dq.plan import LayerSpec, Plan
from dq.spec import Granularity, TensorSpec
from dq.taps import tap_inputs
from dq.tuning.binarized import Binarized
from dq.tuning.distill import Distillation
from dq.tuning.loop import Group, tune
from dq.tuning.mimic import Mimicry
from dq.tuning.norms import norms_as_before, norms_to_learn

__all__ = ["BinaryDM"]

logger = logging.getLogger(__name__)


@methods.register("binarydm")
@dataclass(frozen=True)
class BinaryDM(Finetuning):
    """Learn weights of one or two bits; comes after the step that quantizes the others.

    Args:
        outer: Binarizer of the layers near to input and output, which meet most of the features:
            "ebb" ends with one bit, "lmb" with two; see `dq.binarizers`.
        inner: Of the other ones.
        roles: Roles of the layers that are binarized.
        group: Columns that share a scale; 0 for all of a row.
        estimator: Of the gradient of "xnor".
        centred: Whether "xnor" takes out the mean of each row, and stores it.
        fading: Whether the second basis of "ebb" fades out, or is dropped at once as in the paper,
            which short trainings do not make up for.
        salient: Share of the input channels, those of largest inputs, whose weights have more bits
            (PTQ1.61, Zhao et al. 2025, arXiv 2502.13179, has a fifth); see `dq.nn.split`. No
            integer product runs such layers.
        salient_format: Of these.
        weight_rate: Learning rate of weights and biases, in mean magnitudes of a layer's weights.
        scale_rate: Likewise of the scales of binarizers.
        input_rate: Learning rate of the logarithms of the scales of static inputs (LSQ).
        norm_rate: Learning rate of weights and biases of norms; 0 leaves them.
        penalty: Of the second scales that are to vanish, tau of the paper.
        mimicking: Weight of the distance of features, lambda of the paper; 0 for none. The paper's
            1e-4 is for features that are not normalized.
        part: A K-th of the directions of features is compared.
        normalized: Whether features are compared in units of their own variance, block by block.
        progressive: Whether layers begin to be binarized one after the other, a step each, from the
            middle of the model to its ends.

    The other arguments are those of `dq.methods.finetuning`.
    """

    outer: str = "ebb"
    inner: str = "xnor"
    roles: tuple[str, ...] = BLOCKS
    group: int = 0
    estimator: str = "ste"
    centred: bool = False
    fading: bool = True
    salient: float = 0.0
    salient_format: str = "int4"
    weight_rate: float = 0.02
    scale_rate: float = 1e-3
    input_rate: float = 1e-3
    norm_rate: float = 1e-3
    penalty: float = 9e-2
    mimicking: float = 1.0
    part: int = 4
    normalized: bool = True
    progressive: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("outer", "inner"):
            if getattr(self, name) not in binarizers:
                raise unknown(f"value of {name}", getattr(self, name), binarizers.names())
        if self.estimator not in estimators:
            raise unknown("value of estimator", self.estimator, estimators.names())
        check_roles(self.roles)
        if not self.roles:
            raise DQError("roles is empty: nothing would be binarized")
        rates = ("weight_rate", "scale_rate", "input_rate", "norm_rate")
        for name in (*rates, "group", "penalty", "mimicking"):
            if getattr(self, name) < 0:
                raise DQError(f"{name} is 0 or more, not {getattr(self, name)}")
        if not 0 <= self.salient < 1:
            raise DQError(f"salient is a share of the channels, 0 to 1, not {self.salient}")
        if self.salient and self.group:
            raise DQError("salient channels leave no groups of columns: group is 0")
        self._dense()  # checks the name
        both = {self.outer, self.inner}
        if "xnor" not in both and (self.estimator != "ste" or self.centred):
            raise DQError("estimator and centred are of xnor, which is neither outer nor inner")
        if "ebb" not in both and not self.fading:
            raise DQError("fading is of ebb, which is neither outer nor inner")
        if self.part < 1:
            raise DQError(f"part is 1 or more, not {self.part}")

    def decide(self, job: Job) -> Plan:
        """Give weights what their binarizer will put out; see `Method.decide`.

        Raises:
            DQError: If no layer of the plan has one of the roles.
        """
        roles, wanted = job.family.roles(job.model), set(self.roles)
        chosen = {name for name in job.plan.layers if roles[name] in wanted}
        if not chosen:
            raise DQError(
                f"no layer of the plan has one of the roles {', '.join(self.roles)}; put a step "
                "such as ptq before, which quantizes them"
            )
        outer = self._outer(job)
        modules = quantizable(job.model)
        layers = {
            name: self._binary(spec, modules[name], name in outer) if name in chosen else spec
            for name, spec in job.plan.layers.items()
        }
        return dataclasses.replace(job.plan, layers=layers)

    def _binary(self, spec: LayerSpec, layer: Layer, outer: bool) -> LayerSpec:
        channels = input_channels(layer)
        count = min(round(self.salient * channels), channels - 1)
        if not count or (isinstance(layer, nn.Conv2d) and layer.groups != 1):
            return dataclasses.replace(spec, weight=self._stored(outer))
        if spec.transform is not None and spec.transform.rotation:
            raise DQError(
                "salient channels are of inputs as they are: leave hadamard or salient out"
            )
        return dataclasses.replace(
            spec, weight=self._stored(outer), salient=self._dense(), salient_channels=count
        )

    def _dense(self) -> TensorSpec:
        return TensorSpec(self.salient_format, Granularity("channel"), observer="mse")

    def tune(self, job: Job) -> None:
        """See `Finetuning.tune`; norms that have learned are tensors like those before."""
        with norms_as_before(job.model):
            super().tune(job)

    def learn(self, job: Job) -> None:
        """See `Finetuning.learn`."""
        samples, held_out = self.samples(job.calibration), self.samples(self.others(job))
        schedule = self.schedule(job)
        first = samples.batch(samples.shuffled(schedule.seed)[: schedule.batch])
        layers = self._begin(job, first)
        norms = norms_to_learn(job.model) if self.norm_rate else {}
        inputs = static_inputs(job.model) if self.input_rate else []
        groups = self._groups(job, layers, norms, inputs)
        words = share(job.model, sum(p.numel() for group in groups for p in group.parameters))
        logger.info("binarydm: %s", words)
        middle = (len(layers) - 1) / 2

        def at(progress: float) -> None:
            step = math.inf if progress >= 1 else progress * schedule.steps
            for index, layer in enumerate(layers):
                layer.at(progress, not self.progressive or step >= round(abs(index - middle)))

        loss = self._loss(job, layers, first)
        stage = job.calibration.stage("binarydm")
        found = tune(groups, loss, samples, held_out, schedule, job.calibration.work, stage, at)
        for layer in layers:
            layer.end()
        for quantizer in inputs:
            quantizer.settle()
        self.report(job, "binarydm", words, found)

    def _outer(self, job: Job) -> set[str]:
        """Return the names of all layers near to input and output."""
        ends = tuple(f"{name}." for name in job.family.outer(job.model))
        return {name for name in job.family.roles(job.model) if name.startswith(ends)}

    def _binarizer(self, matrix: Tensor, outer: bool) -> Binarizer:
        name = self.outer if outer else self.inner
        options: dict[str, Any] = {}
        if name == "xnor":
            options = {"estimator": self.estimator, "centred": self.centred}
        if name == "ebb":
            options = {"fading": self.fading}
        return binarizers[name](matrix, self.group, **options)

    def _stored(self, outer: bool) -> TensorSpec:
        return self._binarizer(torch.ones(1, self.group or 1), outer).spec

    def _begin(self, job: Job, first: Call) -> list[Binarized]:
        """Make the layers learnable, in the model's order."""
        chosen, outer = layers_of(job, self.roles), self._outer(job)
        sizes = _input_sizes(job.model, chosen, first) if self.salient else {}
        layers = []
        for name in chosen:
            layer: Any = job.model.get_submodule(name)
            if layer.spec.salient is not None:
                count = layer.spec.salient_channels
                layer.set_salient(sizes[name].topk(count).indices.sort().values)
            layers.append(Binarized(layer, partial(self._binarizer, outer=name in outer)))
        return layers

    def _groups(
        self,
        job: Job,
        layers: list[Binarized],
        norms: Mapping[str, nn.Module],
        inputs: list[Quantizer],
    ) -> list[Group]:
        """Return everything that learns."""
        rates = self.weight_rate, self.scale_rate
        groups = [group for layer in layers for group in layer.groups(*rates)]
        if norms:
            learning = [p for norm in norms.values() for p in norm.parameters(recurse=False)]
            groups.append(Group(learning, self.norm_rate))
        if inputs:
            groups.append(Group([q.learn() for q in inputs], self.input_rate))
        return groups

    def _loss(self, job: Job, layers: list[Binarized], first: Call) -> Any:
        """Return the loss of a batch: of the output, the features and the second scales."""
        blocks = job.family.blocks(job.model) if self.mimicking else ()
        weighs = self.mimicking, 1.0
        distilled = Distillation(job.model, blocks, *weighs, autocast=self.autocast)
        if blocks:
            _, features = distilled.teacher(first)
            distilled.local = Mimicry(features, self.part, self.normalized)

        def loss(call: Call) -> Tensor:
            vanishing = [layer.binarizer.regularizer() for layer in layers]
            known = [r for r in vanishing if r.requires_grad]
            total = distilled(call)
            return total + self.penalty * torch.stack(known).mean() if known else total

        return loss


def _input_sizes(model: nn.Module, names: list[str], call: Call) -> dict[str, Tensor]:
    """Return the mean magnitude of each input channel of some layers, in full precision."""
    found: dict[str, Tensor] = {}

    def seen(name: str, x: Tensor) -> None:
        channels = x.movedim(1, -1) if x.dim() == 4 else x
        found[name] = channels.float().abs().flatten(0, -2).mean(0)

    with torch.no_grad(), full_precision(model):
        layers = {name: model.get_submodule(name) for name in names}
        tapped = tap_inputs(layers, seen)
        with tapped:
            run(model, call)
    return found
