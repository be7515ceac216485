"""MixDQ: formats layer by layer, by what each does to the image (Zhao et al. 2024).

arXiv 2405.17873. Three parts: the begin-of-sentence token apart (`dq.methods.bos`), the sensitivity
of each layer measured with content and quality apart (`dq.sensitivity`), and an integer programme
that spends a budget of bytes where it helps most (`dq.allocation`).

Where the paper maximizes a sum of decibels in each group, the default here minimizes the sum of
noise power, with quality weighted: a sum of decibels is content to ruin a few layers. Which weight
is best is decided by images of held-out prompts. `objective="paper"` is the paper's own.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from dataclasses import dataclass

from dq.errors import DQError, unknown
from dq.family import check_scaling
from dq.method import Job, Method, methods
from dq.methods.bos import find_kept, keep
from dq.methods.ptq import PTQ
from dq.methods.suffix import ROUNDING, rounding
from dq.plan import Plan
from dq.presets import FLOAT
from dq.recipe import Recipe, Template, templates
from dq.sensitivity.bits import Bits, Limits, allocate, allocate_paper
from dq.sensitivity.candidates import Candidates
from dq.sensitivity.heldout import drawn, quality, simulated
from dq.sensitivity.survey import Settings, Survey, survey
from dq.sensitivity.times import timed

__all__ = ["MixDQ"]

logger = logging.getLogger("dq")


@methods.register("mixdq")
@dataclass(frozen=True)
class MixDQ(Method):
    """Mixed precision within a budget of bytes.

    Args:
        weight_bits: The budget is what this width takes everywhere (the recipe `wXaY`, with its
            groups and its 8-bit first and last layers).
        megabytes: The budget in MB (10^6 bytes) of the quantizable layers, scales included; 0 to go
            by `weight_bits`.
        weights: Formats that weights may have; see `dq.presets`.
        inputs: Formats that inputs may have; empty leaves all of them float.
        float_share: Share of the multiply-adds that may stay on float inputs.
        dynamic: "static", "dynamic" or "auto": what the model's family prefers.
        objective: "noise", or "paper": the sum of decibels, a budget for each group.
        quality: Weights of the quality group's noise to try.
        held_out: Images by which the best of several plans is chosen; 0 takes the first.
        forced: "pattern=weight|input", e.g. "conv_out=int8|*": layers whose choice is limited.
        run_weights: Weight formats to measure; see `dq.sensitivity.survey.Settings`.
        run_inputs: Input formats to measure.
        share: Of the layers that are measured, those with the most noise by the estimate.
        batches: Batches of the calibration's images to measure on.
        steps: Steps of each.
        content: "ssim" scores the content group by finished images, for `objective="paper"`.
        max_time: The layers may take this share of their time in full precision, as measured on
            this machine; 0 for no limit.
    """

    weight_bits: int = 4
    megabytes: float = 0.0
    weights: tuple[str, ...] = ("int2", "int3", "int4", "int5", "int6", "int8")
    inputs: tuple[str, ...] = ("int8",)
    float_share: float = 0.01
    dynamic: str = "auto"
    objective: str = "noise"
    quality: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0)
    held_out: int = 16
    forced: tuple[str, ...] = ()
    run_weights: tuple[str, ...] = ("int4",)
    run_inputs: tuple[str, ...] = ("int8",)
    share: float = 0.25
    batches: int = 1
    steps: int = 4
    content: str = "noise"
    max_time: float = 0.0

    def __post_init__(self) -> None:
        if self.objective not in ("noise", "paper"):
            raise unknown("objective", self.objective, ("noise", "paper"))
        check_scaling("dynamic", self.dynamic)
        if self.content == "ssim" and self.objective != "paper":
            raise DQError(
                "SSIM and noise cannot be added up: content='ssim' is for the paper's objective"
            )
        if not self.quality or min(self.quality) <= 0:
            raise DQError(f"quality lists weights above 0, not {self.quality}")
        self._settings()  # has something to say about its own
        for entry in self.forced:
            if entry.count("=") != 1 or entry.count("|") != 1:
                raise DQError(f"forced takes 'pattern=weight|input', not {entry!r}")

    def decide(self, job: Job) -> Plan:
        """Measure, solve, and choose on held-out prompts; see `Method.decide`.

        Raises:
            NeedsData: If nothing makes the denoiser run.
            DQError: If no choice of formats keeps the budget.
        """
        kept = find_kept(job)
        candidates = self.candidates(job, kept.every)
        found = survey(job.calibration, candidates, self._settings())
        limits = self._limits(job, candidates)
        if self.max_time:
            table = timed(found.table, candidates, job.model)
            whole = sum(row.seconds[f"{FLOAT}|{FLOAT}"] for row in table.rows)
            found = dataclasses.replace(found, table=table)
            limits = dataclasses.replace(limits, seconds=self.max_time * whole)
        chosen = self._best(job, found, self._proposals(found, limits))
        notes = {job.plan.model: kept.why_not} if kept.why_not and self.inputs else {}
        return dataclasses.replace(candidates.plan(chosen), notes=notes)

    def candidates(self, job: Job, kept_every: int) -> Candidates:
        """Return the formats that compete."""
        dynamic = job.family.is_dynamic(self.dynamic)
        return Candidates.of(job.model, job.family, self.weights, self.inputs, dynamic, kept_every)

    def _settings(self) -> Settings:
        return Settings(
            self.run_weights, self.run_inputs, self.share, self.batches, self.steps, self.content
        )

    def _limits(self, job: Job, candidates: Candidates) -> Limits:
        budget = self.megabytes * 1e6 or self._uniform_bytes(job, candidates)
        forced = dict(entry.split("=") for entry in self.forced)
        share = self.float_share if self.inputs else 1.0
        return Limits(budget, share, forced=forced)

    def _uniform_bytes(self, job: Job, candidates: Candidates) -> int:
        """Return what all candidates take if they have the same width."""
        inputs = "int8" if self.inputs else FLOAT
        uniform = PTQ(f"int{self.weight_bits}", inputs, self.dynamic).decide(job).layers
        uniform = keep(uniform, candidates.roles, candidates.kept_every)
        return sum(
            uniform[name].bytes(*shape) if name in uniform else candidates.bytes(name, FLOAT)
            for name, shape in candidates.shapes.items()
        )

    def _proposals(self, found: Survey, limits: Limits) -> dict[str, Bits]:
        table, candidates = found.table, found.probe.candidates
        if self.objective == "paper":
            splits = allocate_paper(table, candidates, limits)
            return {f"split {index}": bits for index, bits in enumerate(splits)}
        return {
            f"quality x {weight:g}": allocate(table, candidates, limits, weight)
            for weight in self.quality
        }

    def _best(self, job: Job, found: Survey, proposals: dict[str, Bits]) -> Bits:
        """Return the proposal whose images of held-out prompts are nearest to full precision's."""
        different: dict[str, Bits] = {}
        for name, bits in proposals.items():
            if bits not in different.values():
                different[name] = bits
        best = next(iter(different.values()))
        if len(different) == 1 or not self.held_out:
            return best
        source, calibration = job.calibration.source, job.calibration
        assert source is not None  # the survey has used it
        spec = source.held_out(calibration.spec, self.held_out)
        reference = drawn(source, spec, "held-out prompts")
        best_quality = -float("inf")
        for name, bits in different.items():
            with simulated(found.probe, bits):
                images = drawn(source, spec, f"held-out prompts, {name}")
            reached = quality(images, reference)
            logger.info("%s: %.2f dB on %d held-out images", name, reached, spec.n)
            if reached > best_quality:
                best, best_quality = bits, reached
        return best


def _build(found: re.Match[str]) -> Recipe:
    bits = int(found["input"])
    settings: dict[str, int | float | tuple[str, ...]] = {
        "inputs": () if bits == 16 else (f"int{bits}",),
        "run_inputs": () if bits == 16 else (f"int{bits}",),
    }
    if found["fp"]:
        settings["weights"] = (*MixDQ.weights, "nvfp4", "e4m3")
        if bits == 8:
            settings["inputs"] = settings["run_inputs"] = ("int8", "e4m3")
    if found["megabytes"]:
        settings["megabytes"] = float(found["megabytes"])
    else:
        settings["weight_bits"] = int(found["weight"])
    steps = MixDQ(**settings), *rounding(found, "rtn")  # type: ignore[arg-type]
    return Recipe(found[0], steps)


_LINES = {
    "4a8": "mixed 2 to 16 bits in as many bytes as w4a8, 8-bit inputs, by measured sensitivity",
    "5a8": "the same in as many bytes as w5a8",
    "8a8": "the same in as many bytes as w8a8",
    "4a16": "the same in as many bytes as w4a16, float inputs: memory only",
}
for _name, _help in _LINES.items():
    _weight, _input = _name.split("a")
    _pattern = rf"mixdq(?P<fp>(?!))?-w(?P<weight>{_weight})a(?P<input>{_input})(?P<megabytes>(?!))?"
    templates.add(f"mixdq-w{_name}", Template(_pattern + ROUNDING, _help, _build))
templates.add(
    "mixdq-fp-w4a8",
    Template(
        r"mixdq(?P<fp>-fp)-w(?P<weight>[2-8])a(?P<input>8|16)(?P<megabytes>(?!))?" + ROUNDING,
        "integers, nvfp4 and e4m3 compete, in as many bytes as w4a8",
        _build,
    ),
)
templates.add(
    "mixdq-wXaY",
    Template(
        r"mixdq(?P<fp>(?!))?-(w(?P<weight>[2-8])|(?P<megabytes>\d+(\.\d+)?)mb-)"
        r"a(?P<input>[2-8]|16)" + ROUNDING,
        "any X of 2 to 8, or a budget such as mixdq-3.5mb-a8; Y of 2 to 8 or 16; -gptq rounds",
        _build,
    ),
)
