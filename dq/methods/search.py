"""Format search: the split into exponent and mantissa that suits each tensor (Chen et al. 2024).

arXiv 2408.06995. A float of n bits may have any split, and with a real-valued bias (which is
nothing but a scale) any range. Weights have the split of least squared error; inputs the split
and the range of least error of the layer's output, on samples.

What is found is mostly *emulated*: hardware multiplies e4m3, e5m2 and what is contained in them.
Reports say which is which, see `TensorSpec.is_deployable`.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

import torch

from dq.errors import DQError, inside
from dq.family import quantizable
from dq.formats import FloatFormat
from dq.inputs import ChannelRange, Seen, look
from dq.method import ChosenRange, Job, Method, methods
from dq.methods.adaround import AdaRound
from dq.methods.bos import BOS
from dq.methods.ptq import PTQ
from dq.methods.suffix import SUFFIX, changes, rounding
from dq.nn import describe
from dq.nn.layers import Layer
from dq.nn.simulated import segments
from dq.plan import LayerSpec, Plan
from dq.presets import FLOAT
from dq.progress import track
from dq.quantize import choose_scales, fake_quantize
from dq.ranges import InputRange
from dq.recipe import Recipe, Template, templates
from dq.scales import Scales
from dq.spec import TensorSpec
from dq.trial import output_error

__all__ = ["FormatSearch", "splits"]

_MOST_EXPONENT = 5  # wider ones reach further than any tensor


def splits(grid: FloatFormat) -> tuple[str, ...]:
    """Return the formats of as many bits, by name: "e1m6", "e2m5", ... "e5m2" for those of 8."""
    free = grid.bits - grid.signed
    sign = "" if grid.signed else "u"
    widest = min(_MOST_EXPONENT, free)
    return tuple(f"{sign}e{e}m{free - e}" for e in range(1, widest + 1) if free - e <= 6)


@methods.register("search")
@dataclass(frozen=True)
class FormatSearch(Method):
    """Replace every floating-point format with a float32 scale by the best of as many bits.

    Args:
        clips: Shares of an input's range to try, static inputs only.
    """

    clips: tuple[float, ...] = (1.0, 0.8, 0.6, 0.45, 0.3)

    def __post_init__(self) -> None:
        if not self.clips or not all(0 < clip <= 1 for clip in self.clips):
            raise DQError(f"clips lists shares above 0 and up to 1, not {self.clips}")

    @torch.no_grad()
    def decide(self, job: Job) -> Plan:
        """Search for the formats of each layer; see `Method.decide`.

        Raises:
            NeedsData: If nothing makes the denoiser run.
        """
        layers, specs = quantizable(job.model), dict(job.plan.layers)
        seen = [n for n, spec in specs.items() if spec.transform is None and _names(spec.input)]
        inputs = look(job.calibration, seen) if seen else {}
        for name, spec in track(list(specs.items()), "searching formats"):
            with inside(describe(name, layers[name])):
                weight, scales = _best_weight(layers[name], spec.weight)
                specs[name] = dataclasses.replace(spec, weight=weight)
                if name in inputs:
                    specs[name], found = self._best_input(
                        layers[name], specs[name], scales, inputs[name]
                    )
                    chosen = specs[name].input
                    if found is not None and chosen is not None:
                        job.ranges[name] = ChosenRange(chosen, found)
        return dataclasses.replace(job.plan, layers=specs)

    def _best_input(
        self, layer: Layer, spec: LayerSpec, scales: Scales, seen: Seen
    ) -> tuple[LayerSpec, InputRange | None]:
        assert spec.input is not None  # it has formats to try
        early = _ends(layer, spec, seen.early)
        best, least = (spec, 1.0), torch.inf
        for name in _names(spec.input):
            tried = dataclasses.replace(spec, input=dataclasses.replace(spec.input, format=name))
            alone = dataclasses.replace(tried, kept_every=0)
            for clip in self.clips if spec.is_static else (1.0,):
                range = _clipped(early, clip) if spec.is_static else None
                error = output_error(layer, seen.samples, alone, range, scales=scales)
                if error < least:
                    best, least = (tried, clip), error
        found, clip = best
        ends = _ends(layer, spec, seen.range)
        return found, _clipped(ends, clip) if spec.is_static else None


def _names(spec: TensorSpec | None) -> tuple[str, ...]:
    """Return the formats to try; none but for floats with a float32 scale."""
    if spec is None or spec.scale_grid is not None or not isinstance(spec.grid, FloatFormat):
        return ()
    return splits(spec.grid)


def _best_weight(layer: Layer, spec: TensorSpec) -> tuple[TensorSpec, Scales]:
    """Return the split of least squared error, and its scales."""
    matrix = layer.weight.detach().flatten(1)
    names = _names(spec)
    if not names:
        return spec, choose_scales(matrix, spec)
    tried = []
    for name in names:
        changed = dataclasses.replace(spec, format=name, observer="mse")
        scales = choose_scales(matrix, changed)
        error = float((fake_quantize(matrix, scales, changed) - matrix.float()).square().sum())
        tried.append((error, changed, scales))
    _, best, scales = min(tried, key=lambda one: one[0])
    return best, scales


def _ends(layer: Layer, spec: LayerSpec, seen: ChannelRange) -> InputRange:
    """Return the range of each segment of the input."""
    sizes = segments(layer, spec)
    low = torch.stack([part.min() for part in seen.low.split(sizes)])
    return InputRange(low, torch.stack([part.max() for part in seen.high.split(sizes)]))


def _clipped(range: InputRange, clip: float) -> InputRange:
    return InputRange(range.low * clip, range.high * clip)


def _middle(bits: int) -> str:
    """Return the usual format of a width: "e4m3" for 8 bits, "e2m1" for 4."""
    return f"e{bits // 2}m{bits - 1 - bits // 2}"


def _build(found: re.Match[str]) -> Recipe:
    inputs = FLOAT if found["input"] == "16" else _middle(int(found["input"]))
    step = PTQ(
        _middle(int(found["weight"])),
        inputs,
        "auto" if inputs == FLOAT else "static",
        wide="e4m3",
        wide_inputs=FLOAT if inputs == FLOAT else "e4m3",
    )
    kept = () if inputs == FLOAT else (BOS(),)
    rounded = "adaround" if int(found["weight"]) <= AdaRound.widest else "rtn"
    steps = (step, FormatSearch(), *changes(found), *kept, *rounding(found, rounded))
    return Recipe(found[0], steps)


_PATTERN = r"fp-search-w(?P<weight>{})a(?P<input>{})" + SUFFIX
templates.add(
    "fp-search-w4a8",
    Template(
        _PATTERN.format("4", "8"),
        "the best split of 4 and 8 bits for each tensor, learned rounding (Chen et al. 2024); "
        "emulated",
        _build,
    ),
)
templates.add(
    "fp-search-wXaY",
    Template(_PATTERN.format("[3-8]", "[3-8]|16"), "any X of 3 to 8, Y of 3 to 8 or 16", _build),
)
