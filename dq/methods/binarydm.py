"""BinaryDM: weights of one bit, learned (Zheng et al. 2025, arXiv 2404.05662).

Binarizers with more than one basis stand in the outer layers, by default only for the first half of
the training; full precision is the teacher of the output and, projected to few directions, of the
features of every block. Recipes by name are in `dq.methods.binarydm_recipes`.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dq.binarizers import Binarizer, binarizers
from dq.binarizers.estimators import estimators
from dq.calibrate import Call, run, tap_inputs
from dq.errors import DQError, unknown
from dq.family import check_roles, quantizable
from dq.full_precision import full_precision
from dq.method import Job, methods
from dq.methods.finetuning import BLOCKS, Finetuning, layers_of, share, static_inputs
from dq.nn import Quantizer, QuantLayer
from dq.nn.latent import FullWeight
from dq.nn.layers import Layer, input_channels
from dq.nn.split import SplitQuantizer, joined
from dq.nn.swap import replace
from dq.plan import LayerSpec, Plan
from dq.spec import Granularity, TensorSpec
from dq.tuning.distill import Distillation
from dq.tuning.loop import Group, tune
from dq.tuning.mimic import Mimicry

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
        salient: Share of the input channels, those of largest inputs, whose weights have more bits
            (PTQ1.61, Zhao et al. 2025, arXiv 2502.13179, has a fifth); see `dq.nn.split`. No
            integer product runs such layers.
        salient_format: Of these.
        drift: Learning rate of weights, in mean magnitudes of theirs over all steps.
        scale_drift: Likewise of their scales.
        input_rate: Learning rate of the logarithms of the scales of static inputs (LSQ).
        norm_rate: Learning rate of weights and biases of norms; 0 leaves them.
        penalty: Of the second scales that are to vanish, tau of the paper.
        mimicking: Weight of the distance of features, lambda of the paper; 0 for none.
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
    salient: float = 0.0
    salient_format: str = "int4"
    drift: float = 4.0
    scale_drift: float = 1.0
    input_rate: float = 1e-3
    norm_rate: float = 1e-3
    penalty: float = 9e-2
    mimicking: float = 1e-4
    part: int = 4
    normalized: bool = False
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
        rates = ("drift", "scale_drift", "input_rate", "norm_rate")
        for name in (*rates, "group", "penalty", "mimicking"):
            if getattr(self, name) < 0:
                raise DQError(f"{name} is 0 or more, not {getattr(self, name)}")
        if not 0 <= self.salient < 1:
            raise DQError(f"salient is a share of the channels, 0 to 1, not {self.salient}")
        if self.salient and self.group:
            raise DQError("salient channels leave no groups of columns: group is 0")
        self._dense()  # checks the name
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
        count = round(self.salient * input_channels(layer))
        if not count or (isinstance(layer, nn.Conv2d) and layer.groups != 1):
            return dataclasses.replace(spec, weight=self._stored(outer))
        return dataclasses.replace(
            spec, weight=self._stored(outer), salient=self._dense(), salient_channels=count
        )

    def _dense(self) -> TensorSpec:
        return TensorSpec(self.salient_format, Granularity("channel"), observer="mse")

    def tune(self, job: Job) -> None:
        """See `Finetuning.tune`; norms that have learned are tensors like those before."""
        before = {name: norm.weight for name, norm in _norms(job.model).items()}
        kinds = {name: (weight.dtype, weight.requires_grad) for name, weight in before.items()}
        super().tune(job)
        for name, norm in _norms(job.model).items():
            dtype, learns = kinds[name]
            norm.to(dtype).requires_grad_(learns)

    def learn(self, job: Job) -> None:
        """See `Finetuning.learn`."""
        samples, held_out = self.samples(job.calibration), self.samples(self.others(job))
        schedule = self.schedule(job)
        chosen, outer = layers_of(job, self.roles), self._outer(job)
        layers: dict[str, Any] = {name: job.model.get_submodule(name) for name in chosen}
        first = samples.batch(samples.shuffled(schedule.seed)[: schedule.batch])
        sizes = _input_sizes(job.model, chosen, first) if self.salient else {}
        made = {
            name: self._begin(layer, name in outer, sizes.get(name))
            for name, layer in layers.items()
        }
        stands = {name: layer.binarizer for name, layer in layers.items()}
        groups = [group for name in chosen for group in self._groups(layers[name], made[name])]
        norms = _norms(job.model) if self.norm_rate else {}
        for name, norm in norms.items():
            replace(job.model, name, copy.deepcopy(norm).requires_grad_())
        if norms:
            learning = [p for n in norms for p in job.model.get_submodule(n).parameters()]
            groups.append(Group(learning, self.norm_rate))
        inputs = static_inputs(job.model)
        if inputs and self.input_rate:
            groups.append(Group([q.learn() for q in inputs], self.input_rate))
        learned = sum(p.numel() for group in groups for p in group.parameters)
        words = share(job.model, learned)
        logger.info("binarydm: %s", words)
        loss = self._loss(job, [*made.values()], norms, first)
        order = self._order(chosen)

        def at(progress: float) -> None:
            step = math.inf if progress >= 1 else progress * schedule.steps
            for name, binarizer in made.items():
                binarizer.at(progress)
                started = not self.progressive or step >= order[name]
                layers[name].binarizer = stands[name] if started else nn.Identity()

        stage = job.calibration.stage("binarydm")
        found = tune(groups, loss, samples, held_out, schedule, job.calibration.work, stage, at)
        for name, binarizer in made.items():
            self._end(layers[name], binarizer)
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
        return binarizers[name](matrix, self.group, **options)

    def _stored(self, outer: bool) -> TensorSpec:
        return self._binarizer(torch.ones(1, self.group or 1), outer).spec

    def _begin(self, layer: QuantLayer, outer: bool, sizes: Tensor | None) -> Binarizer:
        """Make weight and bias of a layer learnable; return what makes bits of the weight."""
        if layer.spec.salient is not None and sizes is not None:
            layer.set_salient(sizes.topk(layer.spec.salient_channels).indices.sort().values)
        matrix = layer.matrix().detach().float()
        layer.latent = FullWeight(matrix)
        bias = layer.changed_bias()
        if bias is not None:
            layer.latent_bias = nn.Parameter(bias.detach().float().clone())
        split = layer.weight_quantizer
        if not isinstance(split, SplitQuantizer):
            layer.binarizer = made = self._binarizer(matrix, outer).to(matrix.device)
            return made
        made = self._binarizer(matrix[:, ~split.mask], outer).to(matrix.device)
        layer.binarizer = SplitQuantizer(made, split.dense, split.mask)
        return made

    def _groups(self, layer: Any, binarizer: Binarizer) -> list[Group]:
        size = float(layer.latent.value.detach().abs().mean())
        weights = [*layer.latent.parameters()]
        weights += [] if layer.latent_bias is None else [layer.latent_bias]
        scales = [*binarizer.parameters()]
        groups = [Group(weights, self.drift * size / self.steps)]
        return groups + ([Group(scales, self.scale_drift * size / self.steps)] if scales else [])

    def _loss(
        self, job: Job, made: list[Binarizer], norms: Mapping[str, nn.Module], first: Call
    ) -> Any:
        """Return the loss of a batch: of the output, the features and the second scales."""
        blocks = job.family.blocks(job.model) if self.mimicking else ()
        weighs = self.mimicking, 1.0
        distilled = Distillation(
            job.model, blocks, *weighs, autocast=self.autocast, originals=norms
        )
        if blocks:
            _, features = distilled.teacher(first)
            distilled.local = Mimicry(features, self.part, self.normalized)

        def loss(call: Call) -> Tensor:
            vanishing = [b.regularizer() for b in made]
            known = [r for r in vanishing if r.requires_grad]
            total = distilled(call)
            return total + self.penalty * torch.stack(known).mean() if known else total

        return loss

    def _order(self, chosen: list[str]) -> Mapping[str, int]:
        """Return the step that each layer begins at: from the middle of the model to its ends."""
        middle = (len(chosen) - 1) / 2
        return {name: round(abs(index - middle)) for index, name in enumerate(chosen)}

    def _end(self, layer: Any, binarizer: Binarizer) -> None:
        """Put what is stored in the place of what has learned."""
        matrix, split = layer.latent().detach(), layer.weight_quantizer
        mask = split.mask if isinstance(split, SplitQuantizer) else None
        codes, scales, spec = binarizer.export(matrix if mask is None else matrix[:, ~mask])
        assert spec == layer.spec.weight  # as it was decided
        quantizer = Quantizer(spec)
        quantizer.set_scales(scales)
        layer.codes, layer.weight_quantizer, layer.binarizer = codes, quantizer, None
        if mask is not None:
            layer.codes = joined(codes, split.dense.encode(matrix[:, mask]), mask)
            layer.weight_quantizer = SplitQuantizer(quantizer, split.dense, mask)


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


def _norms(model: nn.Module) -> dict[str, Any]:
    """Return the norms that have a weight, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and isinstance(_weight(module), nn.Parameter)
    }


def _weight(module: nn.Module) -> object:
    return getattr(module, "weight", None)
