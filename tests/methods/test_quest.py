"""Selective finetuning on tiny models: what learns, what stays, and what is packed."""

import dataclasses
import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dq.calibrate import CalibrationSpec, NeedsData
from dq.calls import Call, run
from dq.engine import quantize
from dq.errors import DQError
from dq.family import Role, family_of
from dq.method import Method
from dq.methods.gptq import GPTQ
from dq.methods.operands import Operands
from dq.methods.ptq import PTQ
from dq.methods.ptqd import PTQD
from dq.methods.quest import QuEST
from dq.methods.step_groups import StepGroups
from dq.methods.temporal import Temporal
from dq.nn import packed_layers
from dq.plan import Plan
from dq.recipe import Recipe
from dq.tuning.distill import Distillation
from tests.models import MODELS
from tests.packed import same_state
from tests.sources import Samples

W4 = PTQ("int4", "int8", "static")
SHORT = QuEST(steps=6, batch=4)
each = pytest.mark.parametrize("name", ["sd32", "dit64", "pixart64"])


def network(name: str = "dit64") -> nn.Module:
    return MODELS[name].network(MODELS[name].build()).eval()


def tuned(
    *steps: Method, name: str = "dit64", work: Path | None = None, model: nn.Module | None = None
) -> tuple[nn.Module, Plan]:
    made = network(name) if model is None else model
    recipe = Recipe("t", steps, CalibrationSpec(n=4, steps=2, batch=2))
    return made, quantize(made, recipe, Samples(made), work)


def held_out_error(model: nn.Module, name: str) -> float:
    """Mean squared error of the output, on the calls that the best state is chosen by."""
    original = network(name)
    total = 0.0
    for batch, call in itertools.product(range(3), range(2)):
        generator = torch.Generator().manual_seed(1000 + 10 * batch + call)  # as `Samples` has them
        inputs = family_of(original).sample_inputs(original, 2, generator)
        with torch.no_grad():
            wanted = original(**inputs, return_dict=False)[0]
            total += float((model(**inputs, return_dict=False)[0] - wanted).square().mean())
    return total


@each
def test_it_comes_nearer_to_full_precision(name: str) -> None:
    step = dataclasses.replace(SHORT, steps=60, batch=8, drift=0.5)
    still = dataclasses.replace(SHORT, drift=0.0, scale_rate=0.0, weight_scale_rate=0.0)
    before, _ = tuned(W4, still, name=name)
    after, plan = tuned(W4, step, name=name)
    assert held_out_error(after, name) < 0.97 * held_out_error(before, name)
    assert packed_layers(after).keys() == plan.layers.keys()


@each
@pytest.mark.parametrize("time", [False, True])
def test_layers_of_time_learn_if_they_are_to(
    name: str, time: bool, caplog: pytest.LogCaptureFixture
) -> None:
    roles = family_of(network(name)).roles(network(name))
    mine = {n for n, role in roles.items() if role is Role.TIME}
    with caplog.at_level(logging.INFO, logger="dq"):
        model, plan = tuned(W4, dataclasses.replace(SHORT, time=time), name=name)
    learned = caplog.text.partition("weights learn, of ")[2].partition("\n")[0].split(", ")
    assert bool(mine & set(learned)) == time
    assert (mine <= set(learned)) == time
    assert packed_layers(model).keys() == plan.layers.keys()


def test_learning_goes_with_tables_groups_of_steps_and_attention() -> None:
    steps = (W4, Temporal("cache"), StepGroups(1), Operands(), GPTQ(), SHORT, PTQD(1))
    model, plan = tuned(*steps)
    assert any(spec.tabled for spec in plan.layers.values())
    assert any(spec.output_groups for spec in plan.layers.values())
    assert plan.attention
    assert "weights learn; loss on held-out images" in plan.notes["quest"]
    for name, layer in packed_layers(model).items():
        grouped = plan.layers[name].input is not None and plan.layers[name].input.step_groups
        assert layer.input_affine.dim() == (3 if grouped else 2)


@pytest.mark.parametrize("settings", [{"compute": "bfloat16"}, {"checkpointing": True}])
def test_cheaper_ways_to_learn(settings: dict[str, Any]) -> None:
    step = dataclasses.replace(SHORT, steps=60, batch=8, drift=0.5)
    whole, _ = tuned(W4, step)
    cheap, _ = tuned(W4, dataclasses.replace(step, **settings))
    if "checkpointing" in settings:
        assert same_state(cheap, whole)
    before = held_out_error(tuned(W4, dataclasses.replace(SHORT, drift=0.0))[0], "dit64")
    assert held_out_error(cheap, "dit64") < before


def test_a_model_in_bfloat16_learns_in_float32_and_stays_what_it_was() -> None:
    model = network().bfloat16()
    tuned(W4, SHORT, model=model)
    assert model.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.uint8}


def test_token_models_learn_by_topkld() -> None:
    step = dataclasses.replace(SHORT, steps=40, drift=0.5, loss="topkld", top_tokens=8)
    still = dataclasses.replace(step, steps=1, drift=0.0, scale_rate=0.0, weight_scale_rate=0.0)
    (before, _), (after, _) = (tuned(W4, each, name="amused") for each in (still, step))
    original = network("amused")
    error = {"before": 0.0, "after": 0.0}
    for batch in range(3):
        generator = torch.Generator().manual_seed(1000 + 10 * batch)
        inputs = family_of(original).sample_inputs(original, 2, generator)
        with torch.no_grad():
            wanted = run(original, inputs).log_softmax(1)
            for key, model in (("before", before), ("after", after)):
                found = run(model, inputs).log_softmax(1)
                error[key] += float((wanted.exp() * (wanted - found)).sum(1).mean())
    assert error["after"] < error["before"]


def test_models_without_logits_have_no_topkld() -> None:
    with pytest.raises(DQError, match="compares logits over tokens, and a DiTTransformer2DModel"):
        tuned(W4, dataclasses.replace(SHORT, loss="topkld"))


@pytest.mark.parametrize("dies_at", [0, 3, 5])
def test_a_killed_run_ends_in_the_same_bits(
    dies_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = (W4, GPTQ(), SHORT)
    whole, _ = tuned(*steps)
    calls = 0
    loss = Distillation.__call__

    def dying(self: Distillation, call: Call) -> Tensor:
        nonlocal calls
        calls += torch.is_grad_enabled()
        if calls > dies_at:
            raise KeyboardInterrupt
        return loss(self, call)

    model = network()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Distillation, "__call__", dying)
        tuned(*steps, work=tmp_path, model=model)
    assert not packed_layers(model)
    again, _ = tuned(*steps, work=tmp_path, model=model)
    assert same_state(again, whole)


def test_the_float_model_is_as_trainable_as_before() -> None:
    model = network()
    frozen = model.transformer_blocks[0].ff.net[2].weight.requires_grad_(False)
    others = [p for p in model.parameters() if p is not frozen]
    with pytest.raises(DQError, match="no quantized layer has one of the roles caption; there are"):
        tuned(W4, dataclasses.replace(SHORT, critical=(Role.CAPTION,)), model=model)
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in others)


def test_a_product_of_low_rank_is_merged() -> None:
    full, plan = tuned(W4, SHORT)
    thin, same = tuned(W4, dataclasses.replace(SHORT, rank=4))
    assert plan.layers == same.layers
    assert thin.state_dict().keys() == full.state_dict().keys()


def test_it_says_what_learns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dq"):
        tuned(W4, dataclasses.replace(SHORT, critical=(Role.FEED_FORWARD,)))
    text = caplog.text
    assert "weights learn, of transformer_blocks.0.ff.net.0.proj, " in text
    assert "attn1" not in text.partition("weights learn")[2].partition("\n")[0]
    assert "loss on held-out images" in text


def test_without_data_it_says_what_it_needs() -> None:
    model = network()
    with pytest.raises(NeedsData):
        quantize(model, Recipe("t", (W4, SHORT)), None)


@pytest.mark.parametrize("name", [
        "quest-w4a8", "quest-w8a8", "quest-w4a4", "quest-paper", "quest-w4a8-cache",
        "quest-w4a8-align", "quest-w4a8-static-s4", "quest-w8a8-static-s8-cache",
    ],
)  # fmt: skip
def test_recipes_by_name(name: str) -> None:
    made = Recipe.get(name)
    assert isinstance(made.steps[-1], QuEST)
    assert Recipe.from_dict(made.to_dict()) == made


@pytest.mark.parametrize("name", ["quest-w4a4-static", "quest-w4a4-dynamic", "quest-w4a4-s4"])
def test_inputs_of_4_bits_have_no_static_scales(name: str) -> None:
    with pytest.raises(DQError, match="unknown recipe"):
        Recipe.get(name)


class Twice(Samples):
    """Feeds every batch at two timesteps."""

    @torch.no_grad()
    def run(self, spec: CalibrationSpec, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(spec.seed + batch)
        inputs = family_of(self.model).sample_inputs(self.model, 2, generator)
        run(self.model, {**inputs, "timestep": torch.tensor(900)})
        return run(self.model, {**inputs, "timestep": torch.tensor(100)})


def test_layers_of_time_learn_alone_with_scales_by_step() -> None:
    model = network("sd32")
    steps = PTQ("int8", "int8", "static"), StepGroups(2), QuEST(steps=2, batch=2, time=True)
    recipe = Recipe("t", steps, CalibrationSpec(n=4, steps=2, batch=2))
    plan = quantize(model, recipe, Twice(model))
    assert "quest" in plan.notes


def test_scales_that_are_powers_of_two_stay() -> None:
    model, _ = tuned(PTQ("mxfp4", "float"), QuEST(critical=(), steps=4, batch=2))
    layers = packed_layers(model).values()
    assert {float(x.weight_scale) for x in layers if x.spec.weight.scale_format == "e8m0"} == {1.0}


def test_when_nothing_learns_it_says_so() -> None:
    with pytest.raises(DQError, match="nothing learns"):
        tuned(W4, QuEST(critical=(), scale_rate=0, weight_scale_rate=0, steps=2, batch=2))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"loss": "kl"}, "unknown value of loss 'kl'"),
        ({"compute": "fp16"}, "unknown value of compute 'fp16'"),
        ({"critical": ["attention"]}, "unknown role 'attention'"),
        ({"steps": 0}, "steps is 1 or more, not 0"),
        ({"accumulate": 3}, "accumulate 3 does not divide batch 8"),
        ({"drift": -1}, "drift is 0 or more, not -1"),
        ({"rank": -1}, "rank is 0 or more, top_tokens 1 or more"),
        ({"held_out": 0}, "held_out is 1 or more images, not 0"),
        ({"local_weight": 0, "global_weight": 0}, "local_weight and global_weight are"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(DQError, match=rf"steps\[0\]: {text}"):
        Recipe.from_dict({"steps": [{"method": "quest", **settings}]})
