"""Methods that change inputs: exact in full precision, and a help where they should be."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from dq.calibrate import Calibration, CalibrationSpec
from dq.calls import run
from dq.distance import relative_error
from dq.engine import decide, quantize, start
from dq.errors import DQError
from dq.family import Role, family_of
from dq.inputs import ChannelRange, Seen, look
from dq.method import ChosenRange, Method
from dq.methods.changes import Change, Site
from dq.methods.hadamard import Hadamard
from dq.methods.outliers import OutlierSuppression
from dq.methods.preshift import PreShift
from dq.methods.ptq import PTQ
from dq.methods.salience import Salience
from dq.methods.smoothquant import SmoothQuant, largest_weights, smoothing
from dq.methods.unsigned import Unsigned, unsigned_spec
from dq.nn import QuantLayer, install, packed_layers
from dq.plan import LayerSpec
from dq.presets import input_preset, weight_preset
from dq.ranges import InputRange
from dq.recipe import Recipe
from dq.taps import tap_inputs
from dq.transform import NO_TRANSFORM, Transform
from dq.trial import output_error
from dq.work import Work
from tests.models import MODELS
from tests.sources import Samples

DATA = {
    "smoothquant": SmoothQuant(),
    "salience": Salience(),
    "outliers": OutlierSuppression(),
    "preshift": PreShift(),
    "unsigned": Unsigned(),
}
ALL = {**DATA, "hadamard": Hadamard(size=16)}
each = pytest.mark.parametrize("method", ALL.values(), ids=[*ALL])
INT4 = LayerSpec(weight_preset("int8"), input_preset("int4", dynamic=True))
FP4 = LayerSpec(weight_preset("e4m3"), input_preset("e2m1", dynamic=False))


def network(name: str) -> nn.Module:
    return MODELS[name].network(MODELS[name].build()).eval()


def site(x: torch.Tensor, spec: LayerSpec, outputs: int = 16) -> Site:
    """One layer, seen with `x` in both halves of a calibration."""
    torch.manual_seed(0)
    layer = nn.Linear(x.shape[1], outputs)
    ends = ChannelRange(x.amin(0), x.amax(0))
    seen = Seen(ends, ends, x, x.abs().amax(0, keepdim=True))
    return Site({"layer": layer}, {"layer": spec}, seen, NO_TRANSFORM)


def with_outliers(channels: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, channels, generator=generator)
    x[:, 3] = x[:, 3] * 30 + 40
    return x


@torch.no_grad()
def outputs(model: nn.Module) -> list[torch.Tensor]:
    family, found = family_of(model), []
    for seed in range(3):
        call = family.sample_inputs(model, 2, torch.Generator().manual_seed(90 + seed))
        found.append(model(**call, return_dict=False)[0])
    return found


@each
@pytest.mark.parametrize("name", ["sd32", "dit64"])
@pytest.mark.parametrize("dynamic", ["static", "dynamic"])
def test_the_model_computes_the_same(name: str, dynamic: str, method: Method) -> None:
    """What is left of a quantized model when nothing is rounded."""
    model = network(name)
    expected = outputs(model)
    inputs = "e4m3" if isinstance(method, PreShift) else "int8"
    recipe = Recipe("t", (PTQ("int8", inputs, dynamic), method))
    job = start(model, recipe, Samples(model), None)
    for step in recipe.steps:
        job.plan = step.decide(job)
    changed = {n: spec for n, spec in job.plan.layers.items() if spec.transform is not None}
    assert changed or isinstance(method, Unsigned)
    install(model, job.plan, transforms=job.transforms)
    for layer in model.modules():
        if isinstance(layer, QuantLayer):
            layer.weight_quantizer = nn.Identity()
            layer.input_quantizers = nn.ModuleList()
    for y, z in zip(outputs(model), expected, strict=True):
        assert relative_error(y, z) < 1e-5


@pytest.mark.parametrize("method", DATA.values(), ids=[*DATA])
def test_they_need_data(method: Method) -> None:
    model = network("dit64")
    inputs = "e4m3" if isinstance(method, PreShift) else "int4"
    with pytest.raises(DQError, match="needs calibration data"):
        decide(model, Recipe("test", (PTQ("int8", inputs, "dynamic"), method)))


def test_a_rotation_needs_none_and_is_the_largest_that_fits() -> None:
    model = network("dit64")
    plan = decide(model, Recipe("test", (PTQ("int4", "int4", "dynamic"), Hadamard(size=32))))
    for name, spec in plan.layers.items():
        layer = model.get_submodule(name)
        channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        wanted = min(32, channels & -channels)
        found = 0 if spec.transform is None else spec.transform.rotation
        assert found == (wanted if wanted >= 8 else 0)


@pytest.mark.parametrize("change", ["smooth", "salience", "outliers", "hadamard", "unsigned"])
def test_names_of_recipes_say_what_is_done(change: str) -> None:
    steps = Recipe.get(f"w4a4-dynamic-{change}-gptq").steps
    assert isinstance(steps[0], PTQ)
    assert isinstance(steps[1], Change)
    assert type(steps[2]).__name__ == "GPTQ"
    assert isinstance(Recipe.get("fp4-w4a8-preshift").steps[1], PreShift)


@pytest.mark.parametrize("name", ["sd32", "sdxl"])
def test_norms_take_over_what_they_can(name: str) -> None:
    model = network(name)
    norms = {
        n: m.weight.clone() for n, m in model.named_modules() if n in family_of(model).fed(model)
    }
    plan = quantize(
        model, Recipe("t", (PTQ("int8", "int8", "dynamic"), SmoothQuant())), Samples(model)
    )
    layers = packed_layers(model)
    for norm, followers in family_of(model).fed(model).items():
        assert not torch.equal(model.get_submodule(norm).weight, norms[norm])
        for follower in followers:
            assert plan.layers[follower].transform is None
            assert layers[follower].spec == plan.layers[follower]
            assert layers[follower].input_scale is None
    left = [name for name, spec in plan.layers.items() if spec.transform is not None]
    assert left
    assert all(layers[name].input_scale is not None for name in left)


def test_a_later_step_may_decide_anew() -> None:
    model = network("sd32")
    steps = (PTQ("int8", "int8", "static"), SmoothQuant(), PTQ("int8", "int8", "static"))
    plan = quantize(model, Recipe("t", steps), Samples(model))
    assert all(spec.transform is None for spec in plan.layers.values())
    plain = network("sd32")
    quantize(plain, Recipe("t", steps[:1]), Samples(plain))
    for y, z in zip(outputs(model), outputs(plain), strict=True):
        assert torch.equal(y, z)


def test_a_failure_leaves_norms_as_they_were() -> None:
    model = network("sd32")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipe = Recipe("t", (PTQ("int8", "int8", "static"), SmoothQuant(), PTQ(weight_observer="no")))
    with pytest.raises(DQError, match="unknown observer"):
        quantize(model, recipe, Samples(model))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_static_layers_that_see_prompts_are_left_to_the_kept_token() -> None:
    model = network("sd32")
    plan = quantize(
        model, Recipe("t", (PTQ("int8", "int8", "static"), SmoothQuant())), Samples(model)
    )
    roles = family_of(model).roles(model)
    for name, spec in plan.layers.items():
        if roles[name] is Role.CROSS_KV:
            assert spec.transform is None


def test_smoothing_is_the_published_formula() -> None:
    x, w = torch.tensor([8.0, 2.0, 1.0]), torch.tensor([0.5, 2.0, 1.0])
    for alpha in (0.0, 0.5, 0.8, 1.0):
        expected = x.pow(alpha) / w.pow(1 - alpha)
        found = smoothing(x, w, alpha)
        assert torch.allclose(found / found[0], expected / expected[0])
        assert found.log().mean().abs() < 1e-6
    dead = smoothing(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]), 0.5)
    assert dead.isfinite().all()
    assert (dead > 0).all()


def test_largest_weights_are_by_input_channel() -> None:
    conv = nn.Conv2d(8, 6, 3, groups=2)
    found = largest_weights(conv)
    for channel in range(8):
        group, inside = divmod(channel, 4)
        mine = conv.weight[group * 3 : group * 3 + 3, inside]
        assert found[channel] == mine.abs().max()


def test_outlier_channels_are_centred_and_divided() -> None:
    x = with_outliers()
    one = site(x, INT4)
    found = OutlierSuppression().change(one)
    assert found is not None
    assert found.shift is not None
    assert found.scale is not None
    assert found.scale[3] == found.scale.max() > 2
    assert found.shift[3] == pytest.approx(float((x[:, 3].min() + x[:, 3].max()) / 2))
    assert OutlierSuppression(shift=False).change(one).shift is None


def test_what_does_not_help_is_left() -> None:
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    flat = x / x.abs().amax(0) * 3
    eight = dataclasses.replace(INT4, input=input_preset("int8", dynamic=True))
    assert OutlierSuppression(thresholds=(1.0,), shift=False).change(site(flat, eight)) is None


def test_exponents_are_shifted_by_powers_of_two_within_the_span_of_the_format() -> None:
    x = with_outliers() * torch.logspace(0, -4, 32)
    found = PreShift().change(site(x, FP4))
    assert found is not None
    assert found.shift is None
    power = torch.log2(found.scale)
    assert torch.equal(power, power.round())
    assert power.max() == 0
    assert power.min() == -3  # two bits of exponent
    with pytest.raises(DQError, match="its input is not floating point"):
        PreShift().change(site(x, INT4))


@pytest.mark.parametrize(
    ("name", "unsigned"),
    [("int4", "uint4"), ("e2m1", "ue2m2"), ("e4m3", "ue4m4"), ("nvfp4", None), ("uint4", None)],
)
def test_unsigned_formats_give_the_sign_to_the_magnitude(name: str, unsigned: str | None) -> None:
    spec = input_preset(name, dynamic=True)
    found = unsigned_spec(spec)
    assert (None if found is None else found.format) == unsigned


@pytest.mark.parametrize("act", [nn.functional.silu, nn.functional.gelu])
def test_after_silu_and_gelu_no_sign_is_worth_more_than_four_decibels(act) -> None:
    x = act(torch.randn(512, 64, generator=torch.Generator().manual_seed(0)) * 2)
    one = site(x, INT4)
    found = Unsigned().change(one)
    assert found is not None
    assert found.shift.unique().tolist() == [pytest.approx(float(x.min()))]
    layer = one.layers["layer"]
    changed = Unsigned().changed_spec(INT4, found)
    assert changed.input.format == "uint4"

    def quality(spec: LayerSpec, transform: Transform) -> float:
        return -10 * math.log10(output_error(layer, x, spec, None, transform))

    assert quality(changed, found) > quality(INT4, NO_TRANSFORM) + 4
    assert Unsigned().change(site(x - 3, INT4)) is None


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: SmoothQuant(alpha=1.5), "alpha is 0 to 1, not 1.5"),
        (lambda: Salience(alpha=-0.5), "alpha is 0 to 1, not -0.5"),
        (lambda: OutlierSuppression(thresholds=()), "thresholds lists shares"),
        (lambda: OutlierSuppression(thresholds=(2.0,)), "thresholds lists shares"),
        (lambda: Hadamard(size=12), "size is a power of two from 8 up, not 12"),
        (lambda: Unsigned(most=1.0), "most is 0 or more and below 1"),
        (lambda: SmoothQuant(roles=("tim",)), "unknown role 'tim'. Did you mean 'time'"),
    ],
)
def test_settings_out_of_range_are_refused(make, text: str) -> None:
    with pytest.raises(DQError, match=text):
        make()


@pytest.mark.parametrize(
    ("second", "what"),
    [
        (OutlierSuppression(), "shift and scale"),
        (SmoothQuant(), "smoothing"),
        (Salience(), "salience balancing"),
    ],
)
def test_two_scales_on_one_input_are_refused(second: Method, what: str) -> None:
    model = network("dit64")
    steps = (PTQ("int8", "int8", "dynamic"), SmoothQuant(), second)
    with pytest.raises(DQError, match=f"its input is scaled already: {what} comes first"):
        quantize(model, Recipe("t", steps), Samples(model))


def test_a_rotation_goes_on_top_of_a_scale() -> None:
    model = network("dit64")
    steps = (PTQ("int4", "int4", "dynamic"), SmoothQuant(), Hadamard(size=16))
    plan = quantize(model, Recipe("t", steps), Samples(model))
    both = [s for s in plan.layers.values() if s.transform and s.transform.rotation]
    assert both
    assert all(spec.transform.scale for spec in both)


def test_a_bias_that_only_a_shift_has_brought_is_spoken_of_in_the_plan() -> None:
    """A checkpoint is loaded by its plan: another bias would find no place."""
    model, plain = network("sd32"), network("sd32")
    steps = (PTQ("int8", "int4", "dynamic"), OutlierSuppression(thresholds=(0.5,)))
    plan = quantize(model, Recipe("t", steps), Samples(model))
    gained = 0
    for name, layer in packed_layers(model).items():
        if layer.bias is not None and plain.get_submodule(name).bias is None:
            assert plan.layers[name].transform.shift
            gained += 1
    assert gained


@each
def test_a_range_that_was_chosen_for_the_input_before_is_dropped(method: Method) -> None:
    model = network("dit64")
    base = PTQ("e2m1", "e2m1", "static", wide="e4m3", wide_inputs="e2m1")
    job = start(model, Recipe("t", (base,)), Samples(model), None)
    job.plan = base.decide(job)
    one = torch.ones(1)
    for name, spec in job.plan.layers.items():
        job.ranges[name] = ChosenRange(spec.input, InputRange(-one, one))
    plan = method.decide(job)
    changed = {name for name, spec in plan.layers.items() if spec.transform is not None}
    assert changed
    assert job.ranges.keys() == plan.layers.keys() - changed


LAYERS = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.2", "pos_embed.proj")


def looked(model: nn.Module, work: Path | None = None) -> dict[str, Seen]:
    """Look at a few layers of the tiny DiT, in three batches of two calls."""
    return look(Calibration(model, Samples(model), CalibrationSpec(), Work(work)), LAYERS)


@torch.no_grad()
def test_what_is_seen_of_an_input_is_its_range_and_its_reach_at_each_step() -> None:
    model = network("dit64")
    batches = list(Calibration(model, Samples(model), CalibrationSpec()).batches())
    layers = {name: model.get_submodule(name) for name in LAYERS}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in LAYERS}
    with tap_inputs(layers, lambda name, x: found[name].append(x)):
        for calls in batches:
            for call in calls:
                run(model, call)
    for name, seen in looked(model).items():
        axis = 1 if isinstance(layers[name], nn.Conv2d) else -1
        rows = [x.movedim(axis, -1).flatten(0, -2) for x in found[name]]  # a batch's two calls
        early, every = torch.cat(rows[:4]), torch.cat(rows)
        for ends, all_rows in ((seen.early, early), (seen.range, every)):
            assert torch.equal(ends.low, all_rows.amin(0))
            assert torch.equal(ends.high, all_rows.amax(0))
        expected = [torch.cat(rows[step::2]).abs().amax(0) for step in (0, 1)]
        assert torch.equal(seen.by_step, torch.stack(expected))
        assert torch.equal(seen.by_step.amax(0), every.abs().amax(0))


def test_a_step_that_does_not_reach_a_layer_has_no_magnitude() -> None:
    model = network("dit64")
    calls = 0

    def skip(block: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        later.forward = forward if calls % 2 else lambda x, *rest, **options: x

    first, later = model.transformer_blocks
    forward = later.forward
    first.register_forward_hook(skip)
    seen = looked(model)
    assert (seen[LAYERS[0]].by_step > 0).all()
    by_step = seen[LAYERS[1]].by_step
    assert by_step.shape[0] == 2
    assert by_step[0].any()
    assert not by_step[1].any()


def test_what_was_seen_is_kept_and_what_is_missing_is_seen_anew(tmp_path: Path) -> None:
    model = network("dit64")
    first = looked(model, tmp_path)
    (stage,) = tmp_path.glob("inputs-*")
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model.register_forward_pre_hook(count)
    stored = Work(tmp_path).load(stage.stem)
    for missing in (None, f"{LAYERS[1]}.by_step"):  # as an earlier version has left it
        Work(tmp_path).save(stage.stem, {k: v for k, v in stored.items() if k != missing})
        again = looked(model, tmp_path)
        assert calls == (0 if missing is None else 6)  # replayed: the calls were kept as well
        for name, seen in again.items():
            for a, b in zip(seen.range, first[name].range, strict=True):
                assert torch.equal(a, b)
            assert torch.equal(seen.by_step, first[name].by_step)
            assert torch.equal(seen.samples, first[name].samples)
