"""QuEST: selective finetuning of a quantized denoiser (Wang et al. 2024, arXiv 2402.03666).

The few layers that matter most learn to make up for what quantization does, with the network in
full precision for a teacher: `dq.tuning.distill` has the loss. The scales of inputs learn with
them, and unlike in the paper those of all weights, a number an output channel.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import re
from dataclasses import dataclass

from torch import nn

from dq.calibrate import Calibration, CalibrationSpec, Call
from dq.errors import DQError, unknown
from dq.family import Role, check_roles
from dq.method import Job, Method, methods
from dq.methods.adaround import AdaRound
from dq.methods.bos import BOS
from dq.methods.gptq import GPTQ
from dq.methods.ptq import PTQ
from dq.nn import Quantizer, QuantLayer, exchanged, plain_layers
from dq.nn.latent import FullWeight, LowRankWeight
from dq.plan import Plan
from dq.recipe import Recipe, Template, templates
from dq.rounding.cells import within_cells
from dq.tuning.align import align
from dq.tuning.distill import Distillation
from dq.tuning.loop import Group, Schedule, tune
from dq.tuning.samples import Samples
from dq.work import Work

__all__ = ["QuEST"]

logger = logging.getLogger(__name__)

_TEMPORAL = ("keep", "quantize", "align")
_CRITICAL = (Role.FEED_FORWARD, Role.SELF_ATTENTION, Role.CROSS_ATTENTION, Role.CROSS_KV)
_ALIGNING = 200  # steps of each layer of time, before it learns with the others


@methods.register("quest")
@dataclass(frozen=True)
class QuEST(Method):
    """Learn the weights that matter most, and scales.

    Args:
        temporal: What becomes of the layers that see the timestep: "keep" leaves them in floating
            point, "quantize" as the steps before have decided, "align" lets them learn, first
            alone, then with the others.
        critical: Roles whose weights and biases are learned; those that the model lacks are left
            out, but not all of them.
        steps: Of the optimizer.
        batch: Samples of a step, an image at a timestep each.
        accumulate: Parts that a step is worked on in.
        drift: Learning rate of weights, in levels of their grid over all steps together.
        scale_rate: Learning rate of the logarithms of the scales of static inputs.
        weight_scale_rate: Of those of the weights of all quantized layers; 0 leaves them.
        local_weight: Of the critical layers' own losses.
        global_weight: Of the loss of the network's output.
        rank: 0 learns every weight of a layer; else a product of this rank, merged at the end.
        held_out: Images by which the best state is chosen.
    """

    temporal: str = "keep"
    critical: tuple[str, ...] = _CRITICAL
    steps: int = 500
    batch: int = 8
    accumulate: int = 1
    drift: float = 1.5
    scale_rate: float = 1e-3
    weight_scale_rate: float = 1e-3
    local_weight: float = 1.0
    global_weight: float = 2.0
    rank: int = 0
    held_out: int = 6

    def __post_init__(self) -> None:
        if self.temporal not in _TEMPORAL:
            raise unknown("value of temporal", self.temporal, _TEMPORAL)
        check_roles(self.critical)
        Schedule(self.steps, self.batch, self.accumulate)
        for name in ("drift", "scale_rate", "weight_scale_rate", "local_weight", "global_weight"):
            if getattr(self, name) < 0:
                raise DQError(f"{name} is 0 or more, not {getattr(self, name)}")
        if self.rank < 0 or self.held_out < 1:
            raise DQError("rank is 0 or more, held_out 1 or more")

    def observe(self, job: Job) -> None:
        """Draw the images to learn from, and those to choose by, in full precision."""
        with exchanged(job.model, plain_layers(job.model)):
            for calibration in (job.calibration, self._others(job)):
                for _ in calibration.batches():
                    pass

    def decide(self, job: Job) -> Plan:
        """Leave the plan as it is, but for the layers of time; see `Method.decide`."""
        if self.temporal != "keep":
            return job.plan
        roles = job.family.roles(job.model)
        time = [name for name in job.plan.layers if roles[name] is Role.TIME]
        layers = {name: spec for name, spec in job.plan.layers.items() if name not in time}
        notes = dict.fromkeys(time, "stays float: temporal is keep")
        return dataclasses.replace(job.plan, layers=layers, notes={**job.plan.notes, **notes})

    def tune(self, job: Job) -> None:
        """Learn from captured calls to do what full precision does; see `Method.tune`."""
        learns = [p for p in job.model.parameters() if p.requires_grad]
        try:
            for parameter in learns:
                parameter.requires_grad_(False)
            self._tune(job)
        finally:
            for parameter in learns:
                parameter.requires_grad_(True)

    def _tune(self, job: Job) -> None:
        samples = _samples(job.calibration)
        chosen = self._chosen(job)
        groups: dict[str, list[Group]] = {}

        def learn(name: str) -> list[Group]:
            groups[name] = self._layer(job, name)
            return groups[name]

        roles = job.family.roles(job.model)
        time = [name for name in chosen if roles[name] is Role.TIME]
        if time:
            schedule = Schedule(_ALIGNING, self.batch, seed=job.calibration.spec.seed)
            rows = samples.shuffled(schedule.seed)[:64]
            align(job.model, time, learn, samples.batch(rows), schedule)
        for name in chosen:
            if name not in groups:
                learn(name)
        _report(job.model, groups)
        everything = [group for mine in groups.values() for group in mine]
        everything += self._scales(job.model)
        found = tune(
            everything,
            Distillation(job.model, chosen, self.local_weight, self.global_weight),
            samples,
            _samples(self._others(job)),
            Schedule(self.steps, self.batch, self.accumulate, job.calibration.spec.seed),
            job.calibration.work,
            job.calibration.stage("quest"),
        )
        for module in job.model.modules():
            if isinstance(module, Quantizer):
                module.settle()
        logger.info(
            "quest: loss on held-out images %.4g, %.4g before; from step %d of %d",
            found.best, found.start, found.step, self.steps,
        )  # fmt: skip

    def _others(self, job: Job) -> Calibration:
        own = job.calibration
        if own.source is None:
            return own  # which will say that it needs data
        spec = own.source.held_out(own.spec, self.held_out)
        work = Work(None if own.work.folder is None else own.work.folder / "held-out")
        return Calibration(own.model, own.source, spec, work)

    def _chosen(self, job: Job) -> list[str]:
        """Return the layers that learn, in the model's order."""
        roles = job.family.roles(job.model)
        wanted = {*self.critical, *((Role.TIME,) if self.temporal == "align" else ())}
        layers = [name for name, m in job.model.named_modules() if isinstance(m, QuantLayer)]
        chosen = [name for name in layers if roles[name] in wanted]
        if wanted and not chosen:
            there = sorted({str(roles[name]) for name in layers})
            raise DQError(
                f"no quantized layer has one of the roles {', '.join(sorted(wanted))}; there are: "
                f"{', '.join(there)}"
            )
        return chosen

    def _layer(self, job: Job, name: str) -> list[Group]:
        """Make weight and bias of a layer learnable."""
        layer = job.model.get_submodule(name)
        assert isinstance(layer, QuantLayer)  # it was chosen among them
        matrix, scales = layer.matrix().detach(), layer.weight_quantizer.scales
        if layer.codes is not None:
            matrix = within_cells(matrix, layer.codes, scales, layer.spec.weight)
            layer.codes = None
        bias = layer.changed_bias()
        if bias is not None:
            layer.latent_bias = nn.Parameter(bias.detach().float().clone())
        layer.latent = (
            LowRankWeight(matrix, self.rank, job.generator) if self.rank else FullWeight(matrix)
        )
        mine = [*layer.latent.parameters()]
        if layer.latent_bias is not None:
            mine.append(layer.latent_bias)
        # A weight must not leave its level by noise alone (EfficientDM's scale-aware rate).
        return [Group(mine, self.drift * float(scales.step.mean()) / self.steps)]

    def _scales(self, model: nn.Module) -> list[Group]:
        """Make the scales of static inputs and of weights learnable."""
        layers = [m for m in model.modules() if isinstance(m, QuantLayer)]
        inputs = [q for m in layers for q in m.input_quantizers if isinstance(q, Quantizer)]
        static = [q for q in inputs if not q.spec.dynamic]
        weights = [m.weight_quantizer for m in layers]
        groups = []
        for quantizers, rate in ((static, self.scale_rate), (weights, self.weight_scale_rate)):
            if quantizers and rate:
                groups.append(Group([q.learn() for q in quantizers], rate))
        return groups


def _samples(calibration: Calibration) -> Samples:
    calls: list[Call] = [call for batch in calibration.batches() for call in batch]
    arguments = inspect.signature(calibration.model.forward).parameters
    return Samples(calls, noisy=next(iter(arguments)))


def _report(model: nn.Module, groups: dict[str, list[Group]]) -> None:
    learned = sum(p.numel() for mine in groups.values() for g in mine for p in g.parameters)
    total = sum(p.numel() for name, p in model.named_parameters() if ".latent" not in name)
    logger.info(
        "quest: %.1f %% of %d weights learn, of %s", 100 * learned / total, total, ", ".join(groups)
    )


_WIDE = (Role.IO, Role.TIME, Role.MODULATION)
_CALIBRATION = CalibrationSpec(n=64, steps=16)


def _build(found: re.Match[str]) -> Recipe:
    weight, low = found["weight"], found["input"]
    if low == "4":  # groups of an input have scales of their own, so that outliers stay among them
        ptq = PTQ(f"int{weight}", "int4-g32", wide_inputs="int8", wide_roles=_WIDE)
    else:
        ptq = PTQ(f"int{weight}", f"int{low}", wide_roles=_WIDE)
    rounded = (GPTQ(),) if int(weight) <= GPTQ.widest else ()
    return Recipe(found[0], (ptq, BOS(), *rounded, QuEST()), _CALIBRATION)


def _paper(found: re.Match[str]) -> Recipe:
    ptq = PTQ("int4-g0", "int8", "static", wide_roles=(Role.IO,))
    quest = QuEST(temporal="align", weight_scale_rate=0.0)
    return Recipe(found[0], (ptq, AdaRound(), quest), _CALIBRATION)


for _name, _help in {
    "quest-w4a8": "w4a8 with GPTQ, then attention, feed-forwards and scales are finetuned",
    "quest-w8a8": "the same of w8a8",
    "quest-w4a4": "the same of w4a4, inputs in groups of 32; experimental",
}.items():
    _weight, _input = re.findall(r"\d", _name)
    _pattern = rf"quest-w(?P<weight>{_weight})a(?P<input>{_input})"
    templates.add(_name, Template(_pattern, _help, _build))
templates.add(
    "quest-paper",
    Template(
        "quest-paper",
        "in the form of Wang et al. 2024: AdaRound by channel, one static scale an input",
        _paper,
    ),
)
