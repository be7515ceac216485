"""What all rounding methods have in common: whole models, stage by stage."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from dq import DQConfig, DQPipeline
from dq.calibrate import Calibration, CalibrationSpec, NeedsData
from dq.calls import Call
from dq.distance import sqnr
from dq.engine import decide, quantize
from dq.errors import DQError
from dq.family import families
from dq.method import Job, Method
from dq.methods import rounding
from dq.methods.adaround import AdaRound
from dq.methods.bos import BOS
from dq.methods.gptq import GPTQ
from dq.methods.ptq import PTQ
from dq.methods.rounding import Rounding
from dq.methods.signround import SignRound
from dq.nn import QuantLayer, packed_layers
from dq.nn.simulated import simulate
from dq.plan import LayerSpec, Plan
from dq.presets import input_preset, weight_preset
from dq.recipe import Recipe
from dq.storage import unpack_codes
from dq.transform import NO_TRANSFORM, Transform
from dq.work import Work
from tests.models import MODELS
from tests.models.parts import finish
from tests.nn.layers import LAYERS, build
from tests.packed import CASES, FOLDERS, same_state
from tests.single import One, calibration_of
from tests.sources import Drawing, Samples

W4 = PTQ("int4", "int8", dynamic="dynamic")
QUICK = AdaRound(steps=40, rate=0.1)
SIGNED = SignRound(steps=40)
STEPS = {"gptq": GPTQ(), "adaround": QUICK, "signround": SIGNED}
EACH = pytest.mark.parametrize("step", STEPS.values(), ids=[*STEPS])


def network(name: str = "dit64") -> nn.Module:
    return MODELS[name].network(MODELS[name].build())


def recipe(*steps: Method) -> Recipe:
    return Recipe("test", steps, CalibrationSpec(n=2, steps=2, batch=2))


def rounded(
    *steps: Method, model: nn.Module | None = None, work: Path | None = None
) -> tuple[nn.Module, Plan]:
    """Quantize the tiny DiT, or a model that is given."""
    model = network() if model is None else model
    return model, quantize(model, recipe(*steps), Samples(model, 1), work)


def codes_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the codes of all packed layers, `(N, K)`."""
    found = {}
    for name, layer in packed_layers(model).items():
        state = {"weight": layer.weight.flatten(1), "weight_scale": layer.weight_scale}
        found[name], _ = unpack_codes(state, layer.spec.weight, layer.columns)
    return found


def differing(a: nn.Module, b: nn.Module) -> set[str]:
    """Return the layers whose codes differ."""
    x, y = codes_of(a), codes_of(b)
    assert x.keys() == y.keys()
    return {name for name in x if not torch.equal(x[name], y[name])}


@cache
def captured(name: str) -> tuple[list[Call], Tensor]:
    """Return the calls that a model is calibrated on, and what full precision makes of them."""
    model = network(name)
    calibration = Calibration(model, Samples(model, 1), CalibrationSpec(n=2, steps=2, batch=2))
    (calls,) = calibration.batches()
    return calls, outputs(model, calls)


def outputs(model: nn.Module, calls: list[Call]) -> Tensor:
    replayed = Calibration(model, None, CalibrationSpec()).replay(calls)
    return torch.cat([y.flatten() for y in replayed])


# Most of the work in U-Nets. Convolutions by themselves are rounded below.
HEAVY = ("convolution", "self-attention", "feed-forward")


def _first(name: str) -> PTQ:
    heavy = HEAVY if MODELS[name].denoiser == "unet" else ()
    return dataclasses.replace(W4, skip_roles=heavy)


@cache
def _nearest(name: str) -> tuple[nn.Module, float]:
    """Return a model rounded to nearest, and how near it comes, dB."""
    model, _ = rounded(_first(name), model=network(name))
    calls, wanted = captured(name)
    return model, sqnr(outputs(model, calls), wanted)


@pytest.mark.parametrize(
    ("name", "step"),
    [(name, GPTQ()) for name in MODELS]
    + [
        (name, step)
        for step in (QUICK, SIGNED)
        for name, case in MODELS.items()
        if case.denoiser == "transformer" or name == "sd32"
    ],
    ids=str,
)
def test_every_family_comes_nearer_to_full_precision(name: str, step: Rounding) -> None:
    calls, wanted = captured(name)
    nearest, least = _nearest(name)
    model, plan = rounded(_first(name), step, model=network(name))
    narrow = {n for n, spec in plan.layers.items() if spec.weight.format == "int4"}
    assert narrow
    assert differing(model, nearest) == narrow
    assert sqnr(outputs(model, calls), wanted) > least + 0.5


class _Images(Drawing):
    """Draws as many images as it is told, one at a time."""

    def batches(self, spec: CalibrationSpec) -> int:
        return spec.n


@pytest.mark.skipif("emoji-dit" not in FOLDERS, reason="no trained checkpoint")
def test_a_trained_model_gains_on_images_that_it_has_not_seen() -> None:
    case = CASES["emoji-dit"]
    pipe = case.build()
    model = case.network(pipe)
    fresh = Calibration(model, _Images(case, pipe), CalibrationSpec(n=3))
    calls = list(fresh.batches())[-1]
    wanted, found = outputs(model, calls), []
    # A fourth of its weights, to be quick.
    first = dataclasses.replace(W4, skip_roles=("feed-forward", "modulation"))
    for steps in ((first,), (first, GPTQ())):
        pipe = case.build()
        model = case.network(pipe)
        quantize(model, recipe(*steps), _Images(case, pipe))
        found.append(sqnr(outputs(model, calls), wanted))
    assert found[1] > found[0] + 4


TRANSFORMS: dict[str, Callable[[int], Transform]] = {
    "plain": lambda channels: NO_TRANSFORM,
    "changed": lambda channels: Transform(
        torch.linspace(-1, 1, channels), torch.linspace(0.5, 2, channels), 8
    ),
}


@torch.no_grad()
@EACH
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("weight", ["int4-g8", "e2m1"])
@pytest.mark.parametrize("name", LAYERS)
def test_no_output_gets_worse_on_what_it_is_calibrated_on(
    name: str, weight: str, transform: str, step: Rounding
) -> None:
    layer, x = build(name)
    channels = x.shape[1 if isinstance(layer, nn.Conv2d) else -1]
    changed = TRANSFORMS[transform](channels)
    spec = LayerSpec(weight_preset(weight), input_preset("int8", True), transform=changed.spec)
    made = simulate(layer, spec, transform=changed)
    step = AdaRound(steps=150) if step == QUICK else step
    # Few inputs, in which neighbouring channels are alike: much can be gained.
    inputs = [x + 2 * x.roll(1, made.axis), x.flip(made.axis).cumsum(made.axis)]
    operands = [made.operand(x) for x in inputs]

    def error(weight: Tensor) -> Tensor:
        simple = torch.func.functional_call
        state = {"weight": weight - made.matrix().view(weight.shape)}
        if layer.bias is not None:
            state["bias"] = torch.zeros_like(layer.bias)
        twin = copy.deepcopy(layer)
        if changed.shift is not None and isinstance(twin, nn.Conv2d):  # padded already
            twin._reversed_padding_repeated_twice, twin.padding = [0] * 4, (0, 0)
            twin.padding_mode = "zeros"
        rows = [simple(twin, state, (x,)).movedim(made.axis, -1).flatten(0, -2) for x in operands]
        return torch.cat(rows).square().mean(0)

    before = error(made.rounded_weight())
    model = One(made)
    job = Job(model, families["dit"], Plan("One", {}), calibration_of(model, inputs))
    step.tune(job)
    assert made.codes is not None
    after = error(made.rounded_weight())
    assert (after <= before * 1.001 + 1e-9).all()
    assert after.sum() < 0.97 * before.sum()


def test_layers_of_more_bits_stay_rounded_to_nearest() -> None:
    nearest, plan = rounded(W4)
    narrow = {n for n, spec in plan.layers.items() if spec.weight.format == "int4"}
    wide = set(plan.layers) - narrow
    assert narrow
    assert wide
    for widest, expected in ((4, narrow), (7, narrow), (8, narrow | wide)):
        model, same = rounded(W4, GPTQ(widest=widest))
        assert same == plan
        assert differing(model, nearest) == expected
    with pytest.raises(DQError, match="no weight has at most 3 bits"):
        rounded(W4, GPTQ(widest=3))


@dataclass(frozen=True)
class Notes(Method):
    """A step that keeps what simulated layers hold."""

    codes: dict[str, Tensor | None] = dataclasses.field(default_factory=dict)
    weights: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def tune(self, job: Job) -> None:
        for name, layer in job.model.named_modules():
            if isinstance(layer, QuantLayer):
                self.codes[name] = layer.codes
                self.weights[name] = layer.rounded_weight().detach().clone()


@pytest.mark.parametrize(
    ("weights", "step"),
    [(name, GPTQ()) for name in ("int4", "int3", "e2m1", "nf4-g16", "nvfp4", "mxfp4")]
    + [("int4", QUICK), ("int4", SIGNED)],
    ids=str,
)
def test_packed_layers_hold_the_codes_that_were_chosen(weights: str, step: Rounding) -> None:
    notes = Notes()
    model, _ = rounded(dataclasses.replace(W4, weights=weights), step, notes)
    found = codes_of(model)
    chosen = {n: codes for n, codes in notes.codes.items() if codes is not None}
    assert chosen
    for name, codes in chosen.items():
        assert torch.equal(found[name], codes), name
    for name, layer in packed_layers(model).items():
        assert torch.equal(layer.float_weight(), notes.weights[name]), name


@EACH
def test_scales_and_everything_else_are_those_of_the_nearest(step: Rounding) -> None:
    model, _ = rounded(W4, step)
    nearest, _ = rounded(W4)
    x, y = model.state_dict(), nearest.state_dict()
    assert x.keys() == y.keys()
    for name, tensor in x.items():
        assert torch.equal(tensor, y[name]) or name.endswith(".weight"), name


class _Killed:
    """Counts the calls of a denoiser, and dies once at one of them."""

    def __init__(self, model: nn.Module, dies_at: int | None = None) -> None:
        self.calls = 0
        self.dies_at = dies_at
        model.register_forward_pre_hook(self.hook)

    def hook(self, module: nn.Module, args: Any) -> None:
        self.calls += 1
        if self.calls == self.dies_at:
            raise KeyboardInterrupt("killed")


@cache
def _straight(step: Rounding) -> tuple[nn.Module, Plan]:
    return rounded(W4, step)


# A batch of two calls is captured and replayed; each further part of the layers replays it.
PART = 2


@pytest.mark.parametrize(
    ("dies_at", "step"),
    [
        *((dies_at, GPTQ()) for dies_at in (1, PART + 1, 2 * PART + 1, 5 * PART + 2)),
        (3 * PART + 2, QUICK),
        (3 * PART + 2, SIGNED),
    ],
    ids=str,
)
def test_a_killed_run_resumes_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: int, step: Rounding
) -> None:
    monkeypatch.setattr(rounding, "_MOST_BYTES", 1 << 18)  # several parts
    straight, plan = _straight(step)
    model = network()
    counter = _Killed(model, dies_at)
    with pytest.raises(KeyboardInterrupt):
        rounded(W4, step, model=model, work=tmp_path)
    done = (dies_at - 1) // PART  # stages
    counter.calls, counter.dies_at = 0, None
    assert rounded(W4, step, model=model, work=tmp_path)[1] == plan
    parts = len([*tmp_path.glob("*/*-[0-9]*.safetensors")]) - 1  # less that of the calls
    assert parts > 4
    # What was finished is not done again; the calls are stored as soon as they are captured.
    assert counter.calls == PART * (1 + parts - done)
    assert same_state(model, straight)

    again = network()
    counter = _Killed(again)
    rounded(W4, step, model=again, work=tmp_path)
    assert counter.calls == 0
    assert same_state(again, straight)


def test_steps_of_one_kind_do_not_take_each_others_work(tmp_path: Path) -> None:
    second = PTQ("int3", "int8", dynamic="dynamic")
    straight, _ = rounded(second, GPTQ())
    for work in (tmp_path, tmp_path):
        model, _ = rounded(W4, GPTQ(rows=16), second, GPTQ(), work=work)
        assert same_state(model, straight)
    wider, _ = rounded(W4, GPTQ(), GPTQ(widest=8))
    assert differing(wider, rounded(W4)[0]) == set(codes_of(wider))


def test_images_are_drawn_by_the_model_in_full_precision(tmp_path: Path) -> None:
    case = MODELS["dit64"]
    pipe = case.build()
    expected = Calibration(case.network(pipe), Drawing(case, pipe), CalibrationSpec())
    (first, *_), pipe = expected.batches(), case.build()
    quantize(case.network(pipe), recipe(W4, GPTQ()), Drawing(case, pipe), tmp_path)
    (folder,) = tmp_path.iterdir()
    stored = Work(folder).load("calls-0000")
    assert stored is not None
    assert len(first) == 2  # steps, of which the second sees what the first has made
    for index, call in enumerate(first):
        for key, value in call.items():
            assert torch.equal(stored[f"{index:04d}.{key}"], torch.as_tensor(value)), (index, key)


def check_untouched(model: nn.Module, act: Callable[[], Any], error: type, text: str) -> None:
    state = {n: t.clone() for n, t in model.state_dict().items()}
    types = [type(module) for module in model.modules()]
    with pytest.raises(error, match=text):
        act()
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[n], t) for n, t in state.items())
    assert [type(module) for module in model.modules()] == types
    assert not any(module._forward_pre_hooks for name, module in model.named_modules() if name)


@pytest.mark.parametrize("dies_at", [1, 3, 4])
def test_a_killed_run_leaves_the_model_as_it_was(dies_at: int) -> None:
    model = network()
    _Killed(model, dies_at)
    act = partial(rounded, W4, GPTQ(), model=model)
    check_untouched(model, act, KeyboardInterrupt, "killed")


@EACH
@pytest.mark.parametrize("inputs", ["float", "int8"])
def test_inputs_that_are_not_finite_name_the_layer_and_leave_the_model(
    inputs: str, step: Rounding
) -> None:
    model = network()
    model.transformer_blocks[1].attn1.to_v.bias.data.fill_(torch.inf)
    first = dataclasses.replace(W4, inputs=inputs)
    text = r"^transformer_blocks\.1\.attn1\.to_out\.0 \(Linear 64->64\): .* not finite; "
    check_untouched(model, partial(rounded, first, step, model=model), DQError, text)


@pytest.mark.parametrize(
    "name", ["w4a8-dynamic-gptq", "nvfp4", "mxfp4-adaround", "fp4-w4a16", "w4a8-signround"]
)
def test_without_data_the_remedy_is_named(name: str, model_folders: Callable[[str], Path]) -> None:
    text = r"rounds weights by calibration data, .* DQPipeline.from_pretrained.*'nvfp4-rtn'"
    model = network()
    for act in (decide, quantize):
        check_untouched(model, partial(act, model, Recipe.get(name)), NeedsData, text)
    kind = type(model)
    with pytest.raises(NeedsData, match=text):
        kind.from_pretrained(
            model_folders("dit64"), subfolder="transformer", quantization_config=DQConfig(name)
        )
    # The remedy itself.
    assert decide(model, Recipe.get("nvfp4-rtn")).layers


PLAIN: tuple[Method, ...] = ()
ENDS = {
    "": None,
    "-rtn": PLAIN,
    "-gptq": (GPTQ(),),
    "-adaround": (AdaRound(),),
    "-signround": (SignRound(),),
}
FLOATS = {"wide": "e4m3", "wide_inputs": "e4m3", "dynamic": "dynamic"}
BEGINNINGS: dict[str, tuple[tuple[Method, ...], tuple[Method, ...]]] = {
    # Name: what comes before the rounding, and the rounding unless the name says so.
    "w4a8": ((PTQ("int4", "int8"), BOS()), PLAIN),
    "w4a8-dynamic": ((PTQ("int4", "int8", "dynamic"),), PLAIN),
    "w4a8-static": ((PTQ("int4", "int8", "static"), BOS()), PLAIN),
    "w3a16-g64": ((PTQ("int3-g64", "float"),), PLAIN),
    "w6a6-static": ((PTQ("int6", "int6", "static"), BOS()), PLAIN),
    "nvfp4": ((PTQ("nvfp4", "nvfp4", **FLOATS),), (GPTQ(),)),
    "mxfp4": ((PTQ("mxfp4", "mxfp4", **FLOATS),), (GPTQ(),)),
    "mxfp6": ((PTQ("mxfp6", "mxfp6", **FLOATS),), PLAIN),
    "fp4-w4a8": ((PTQ("e2m1", "e4m3", **FLOATS),), (GPTQ(),)),
    "fp4-w4a8-g32-static": (
        (PTQ("e2m1-g32", "e4m3", **{**FLOATS, "dynamic": "static"}), BOS()),
        (GPTQ(),),
    ),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("name", BEGINNINGS)
def test_names_say_how_weights_are_rounded(name: str, end: str) -> None:
    before, default = BEGINNINGS[name]
    chosen = ENDS[end]
    made = Recipe.get(name + end)
    assert made.name == name + end
    assert made.steps == (*before, *(default if chosen is None else chosen))
    assert Recipe.from_dict(made.to_dict()) == made


@pytest.mark.parametrize("name", ["w4a8-rnt", "nvfp4-gptq-rtn", "nvfp4-gtpq", "w4a8-gptq-dynamic"])
def test_other_ends_are_no_recipes(name: str) -> None:
    with pytest.raises(DQError, match=f"unknown recipe '{name}'"):
        Recipe.get(name)


@pytest.mark.parametrize("name", ["w8a8-gptq", "fp8-adaround", "mxfp8-gptq", "w8a8-signround"])
def test_recipes_with_nothing_to_round_are_refused(name: str) -> None:
    model = network("dit64")
    act = partial(quantize, model, Recipe.get(name), Samples(model))
    check_untouched(model, act, DQError, "no weight has at most 6 bits")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"method": "gptq", "widest": 9}, "widest is 1 to 8 bits, not 9"),
        ({"method": "adaround", "widest": 0}, "widest is 1 to 8 bits, not 0"),
        ({"method": "gptq", "rows": 0}, "rows is 1 or more, not 0"),
        ({"method": "gptq", "damping": 0}, "damping is above 0, not 0"),
        ({"method": "gptq", "damping": -0.1}, "damping is above 0, not -0.1"),
        ({"method": "adaround", "steps": 0}, "steps and rate are above 0, not 0 and 0.03"),
        ({"method": "adaround", "rate": -1}, "steps and rate are above 0, not 500 and -1"),
        ({"method": "signround", "steps": 0}, "steps is above 0 and rate 0 or more, not 0 and 0.0"),
        ({"method": "signround", "rate": -1}, "steps is above 0 and rate 0 or more, not 200 and"),
        ({"method": "adaround", "damping": 1}, "unknown key of the AdaRound 'damping'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(DQError, match=rf"steps\[0\]: {text}"):
        Recipe.from_dict({"steps": [settings]})


@pytest.mark.parametrize(("name", "base"), [("dit64", "w4a8-gptq"), ("flux", "nvfp4")])
def test_saved_and_reloaded_it_draws_the_same(
    name: str, base: str, tmp_path: Path, model_folders: Callable[[str], Path]
) -> None:
    case = MODELS[name]
    asked = {**Recipe.get(base).to_dict(), "calibration": {"n": 1, "steps": 1, "batch": 1}}
    pipe = finish(DQPipeline.from_pretrained(model_folders(name), asked))
    pipe.save_pretrained(tmp_path)
    again = finish(DiffusionPipeline.from_pretrained(tmp_path))
    assert same_state(case.network(pipe), case.network(again))
    assert np.array_equal(case.call(pipe), case.call(again))
    plain = f"{base.removesuffix('-gptq')}-rtn"
    nearest = finish(DQPipeline.from_pretrained(model_folders(name), plain))
    assert not np.array_equal(case.call(pipe), case.call(nearest))
