"""Learning of one-bit weights on tiny models: what is binarized, by what, and what is stored."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dq import DQPipeline
from dq.binarizers import binarizers
from dq.calibrate import CalibrationSpec, NeedsData
from dq.engine import quantize
from dq.errors import DQError
from dq.family import Role, family_of
from dq.full_precision import full_precision
from dq.method import Job, Method
from dq.methods.binarydm import BinaryDM
from dq.methods.hadamard import Hadamard
from dq.methods.ptq import PTQ
from dq.nn import packed_layers
from dq.nn.swap import ORIGINAL
from dq.plan import Plan
from dq.recipe import Recipe
from dq.tuning import loop
from tests.methods.test_quest import held_out_error
from tests.models import MODELS
from tests.packed import forward, same_state
from tests.sources import Samples

WIDE = ("io", "time", "modulation", "caption")
W8 = PTQ("int8", "int8", "static", wide_roles=WIDE)
SHORT = BinaryDM(steps=4, batch=4)
each = pytest.mark.parametrize("name", ["sd32", "dit64", "sd3"])


def network(name: str = "dit64") -> nn.Module:
    return MODELS[name].network(MODELS[name].build()).eval()


def learned(
    step: BinaryDM, name: str = "dit64", first: Method = W8, work: Path | None = None
) -> tuple[nn.Module, Plan]:
    model = network(name)
    recipe = Recipe("t", (first, step), CalibrationSpec(n=4, steps=2, batch=2))
    return model, quantize(model, recipe, Samples(model), work)


@each
def test_blocks_have_one_bit_and_the_rest_eight(name: str) -> None:
    model, plan = learned(SHORT, name)
    roles = family_of(network(name)).roles(network(name))
    bits: dict[int, set[Role]] = {}
    for layer, spec in plan.layers.items():
        bits.setdefault(spec.weight.code_bits, set()).add(roles[layer])
    assert set(bits) == {1, 8}
    assert bits[8] <= {Role.IO, Role.TIME, Role.MODULATION, Role.CAPTION}
    assert not bits[1] & bits[8]
    for layer in packed_layers(model).values():
        if layer.spec.weight.is_binary:
            scale = layer.weight_scale.flatten()
            matrix = layer.float_weight().flatten(1)
            assert torch.equal(matrix.abs(), scale[:, None].expand_as(matrix))


@each
def test_outer_layers_are_those_of_the_family(name: str) -> None:
    step = BinaryDM(steps=1, batch=2, outer="lmb")
    _, plan = learned(step, name)
    family, model = family_of(network(name)), network(name)
    two = {n for n, spec in plan.layers.items() if spec.weight.bases == 2}
    one = {n for n, spec in plan.layers.items() if spec.weight.is_binary} - two
    ends = tuple(f"{n}." for n in family.outer(model))
    assert two
    assert all(n.startswith(ends) for n in two)
    assert not any(n.startswith(ends) for n in one)


@pytest.mark.parametrize("outer", binarizers.names())
def test_learning_helps_whatever_the_binarizer(outer: str) -> None:
    long = BinaryDM(outer, outer, steps=40, batch=8, weight_rate=1 / 40)
    none = BinaryDM(outer, outer, steps=1, batch=2, weight_rate=0.0, scale_rate=0.0, input_rate=0.0)
    errors = [held_out_error(learned(step)[0], "dit64") for step in (none, long)]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"group": 16},
        {"estimator": "reste"},
        {"estimator": "biper"},
        {"progressive": True},
        {"centred": True},
        {"salient": 0.2},
        {"salient": 0.1, "salient_format": "int8", "centred": True, "outer": "lmb"},
        {"mimicking": 0.0},
        {"mimicking": 1e-4, "normalized": False},
        {"compute": "bfloat16"},
        {"checkpointing": True},
        {"roles": ["feed-forward"]},
    ],
    ids=str,
)
def test_what_is_packed_is_what_was_learned(settings: dict[str, Any]) -> None:
    step = BinaryDM(**{"steps": 4, "batch": 2, **settings})  # type: ignore[arg-type]
    model, plan = learned(step)
    assert "% of" in plan.notes["binarydm"]
    call = family_of(model).sample_inputs(model, 2, torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert bool(model(**call, return_dict=False)[0].isfinite().all())
    for layer in packed_layers(model).values():
        if settings.get("salient") and layer.spec.weight.is_binary:
            assert layer.spec.salient_channels == round(settings["salient"] * layer.channels)
            assert layer.salient.shape == (layer.spec.salient_channels,)
            assert layer.path().startswith("simulated")
        if settings.get("group") and layer.spec.weight.is_binary:
            assert layer.spec.weight.scale_format == "uint6"
            assert layer.path().startswith("int8")


@pytest.mark.parametrize(
    "settings",
    [{}, {"outer": "lmb"}, {"outer": "ternary"}, {"salient": 0.2}, {"centred": True, "group": 16}],
    ids=str,
)
def test_checkpoints_are_read_again_bit_for_bit(
    settings: dict[str, Any], model_folders: Any, tmp_path: Path
) -> None:
    step = BinaryDM(**{"steps": 2, "batch": 2, "held_out": 1, **settings})  # type: ignore[arg-type]
    calibration = CalibrationSpec(("7", "8"), n=2, steps=2, batch=2)
    made = DQPipeline.from_pretrained(model_folders("dit64"), Recipe("t", (W8, step), calibration))
    made.save_pretrained(tmp_path)
    again = DQPipeline.from_pretrained(tmp_path)
    assert same_state(again.transformer, made.transformer)
    call = family_of(made.transformer).sample_inputs(
        made.transformer, 2, torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        found, expected = (pipe.transformer(**call, return_dict=False)[0] for pipe in (again, made))
    assert torch.equal(found, expected)


def test_a_killed_run_ends_in_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = BinaryDM(steps=20, batch=4, progressive=True)
    expected, _ = learned(step)
    from dq.tuning import loop

    advance, left = loop._Loop.advance, itertools.count()

    def dying(self: Any) -> None:
        if next(left) == 13:
            raise KeyboardInterrupt
        advance(self)

    monkeypatch.setattr(loop._Loop, "advance", dying)
    with pytest.raises(KeyboardInterrupt):
        learned(step, work=tmp_path)
    monkeypatch.undo()
    again, _ = learned(step, work=tmp_path)
    assert same_state(again, expected)


@pytest.mark.parametrize("name", ["sd32", "flux"])
def test_norms_learn_with_the_weights_and_the_teacher_keeps_its_own(name: str) -> None:
    still, moved = (
        learned(BinaryDM(steps=12, batch=4, weight_rate=0.025, norm_rate=rate), name)[0].bfloat16()
        for rate in (0.0, 1e-2)
    )
    original = network(name).bfloat16().state_dict()
    packed = tuple(f"{n}." for n in packed_layers(moved))
    names = [n for n in original if not n.startswith(packed) and "norm" in n]
    assert names
    assert all(torch.equal(still.state_dict()[n], original[n]) for n in names)
    changed = [n for n in names if not torch.equal(moved.state_dict()[n], original[n])]
    assert changed
    assert {p.dtype for n, p in moved.named_parameters() if n in changed} == {torch.bfloat16}
    assert all(p.requires_grad for n, p in moved.named_parameters() if n in changed)


@dataclass(frozen=True)
class Compared(Method):
    """Keeps what the model says in full precision once an earlier step has learned."""

    found: list[torch.Tensor] = field(default_factory=list)

    def tune(self, job: Job) -> None:
        with full_precision(job.model):
            self.found.append(forward(job.model))


def test_full_precision_stays_what_it_was() -> None:
    model, compared = network("sd32"), Compared()
    expected = forward(model)
    step = BinaryDM(steps=6, batch=4, norm_rate=0.1)
    recipe = Recipe("t", (W8, step, compared), CalibrationSpec(n=4, steps=2, batch=2))
    quantize(model, recipe, Samples(model))
    assert torch.equal(compared.found[0], expected)
    assert not torch.equal(forward(model), expected)
    assert not any(ORIGINAL in name for name in model.state_dict())


def test_a_run_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("sd32")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    advance = loop._Loop.advance

    def killed(self: Any) -> None:
        if self.step == 3:
            raise KeyboardInterrupt
        advance(self)

    monkeypatch.setattr(loop._Loop, "advance", killed)
    recipe = Recipe("t", (W8, BinaryDM(steps=6, batch=4)), CalibrationSpec(n=4, steps=2, batch=2))
    with pytest.raises(KeyboardInterrupt):
        quantize(model, recipe, Samples(model))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(p.requires_grad for p in model.parameters())


def test_norms_of_a_bfloat16_model_learn_under_autocast() -> None:
    model = network("sd32").bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step = BinaryDM(steps=6, batch=4, norm_rate=1e-3, compute="bfloat16")
    recipe = Recipe("t", (W8, step), CalibrationSpec(n=4, steps=2, batch=2))
    quantize(model, recipe, Samples(model))
    after = model.state_dict()
    norms = [n for n in before if "norm" in n and n.endswith("weight") and n in after]
    assert {after[n].dtype for n in norms} == {torch.bfloat16}
    assert any(not torch.equal(after[n], before[n]) for n in norms)


def test_dead_rows_stay_dead() -> None:
    """Signs have no zero: a channel of zeros must not become one of ones."""
    model: Any = network("sd32")
    with torch.no_grad():
        model.mid_block.resnets[0].conv2.weight.zero_()
    recipe = Recipe("t", (PTQ("binary-x2", "float"),), CalibrationSpec())
    quantize(model, recipe, None)
    assert model.mid_block.resnets[0].conv2.float_weight().abs().max() < 1e-9


def test_salient_channels_of_rotated_inputs_are_refused() -> None:
    model = network()
    steps = (PTQ("int8", "int8"), Hadamard(), BinaryDM(salient=0.2, steps=2, batch=2))
    with pytest.raises(DQError, match="leave hadamard or salient out"):
        quantize(model, Recipe("t", steps, CalibrationSpec(n=4, steps=2, batch=2)), Samples(model))


def test_without_data_it_says_what_it_needs() -> None:
    model = network()
    with pytest.raises(NeedsData):
        quantize(model, Recipe("t", (PTQ("int8"), SHORT), CalibrationSpec()), None)


def test_a_plan_without_such_layers_is_refused() -> None:
    with pytest.raises(DQError, match="no layer of the plan has one of the roles"):
        learned(BinaryDM(roles=(Role.CROSS_ATTENTION,)))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"outer": "eb"}, "Did you mean 'ebb'"),
        ({"inner": "xnorr"}, "Did you mean 'xnor'"),
        ({"estimator": "stee"}, "Did you mean 'ste'"),
        ({"roles": []}, "roles is empty"),
        ({"part": 0}, "part is 1 or more, not 0"),
        ({"penalty": -1}, "penalty is 0 or more, not -1"),
        ({"group": 7}, "group size 7 does not divide"),
        ({"salient": 1.0}, "salient is a share of the channels"),
        ({"salient": 0.2, "group": 16}, "salient channels leave no groups"),
        ({"salient_format": "int44"}, "Did you mean 'int4'"),
        ({"inner": "lmb", "outer": "ternary", "centred": True}, "are of xnor"),
        ({"outer": "xnor", "fading": False}, "fading is of ebb"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(DQError, match=text):
        learned(Recipe.from_dict({"steps": [{"method": "binarydm", **settings}]}).steps[0])  # type: ignore[arg-type]
