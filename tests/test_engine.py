import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from dq.calls import run
from dq.engine import decide, quantize
from dq.errors import DQError
from dq.family import family_of, quantizable
from dq.method import Job, Method
from dq.methods.ptq import PTQ
from dq.nn import QuantLayer, packed_layers
from dq.plan import Plan
from dq.recipe import Recipe
from tests.models import MODELS, ModelCase
from tests.sources import Samples

STATIC = Recipe("static", (PTQ("int8", "int8", dynamic="static"),))
DYNAMIC = Recipe("dynamic", (PTQ("int4", "int8", dynamic="dynamic"),))


@dataclass(frozen=True)
class Fails(Method):
    """A step that fails in one of its hooks, after the work is half done."""

    hook: str = "tune"

    def observe(self, job: Job) -> None:
        self._fail(job, "observe")

    def decide(self, job: Job) -> Plan:
        self._fail(job, "decide")
        return job.plan

    def tune(self, job: Job) -> None:
        self._fail(job, "tune")

    def _fail(self, job: Job, hook: str) -> None:
        if hook == self.hook:
            raise RuntimeError(f"failed to {hook}")


def network(name: str = "dit64") -> nn.Module:
    return MODELS[name].network(MODELS[name].build())


@torch.no_grad()
def output(model: nn.Module) -> torch.Tensor:
    inputs = family_of(model).sample_inputs(model, 1, torch.Generator().manual_seed(5))
    return run(model, inputs)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a
    )


@pytest.mark.parametrize("recipe", [STATIC, DYNAMIC], ids=lambda recipe: recipe.name)
def test_every_family_is_quantized_and_packed(
    model_case: ModelCase, model_pipe, recipe: Recipe
) -> None:
    model = model_case.network(model_pipe)
    before = output(model)
    plan = quantize(model, recipe, Samples(model, 1))
    assert set(packed_layers(model)) == set(plan.layers)
    assert not any(isinstance(module, QuantLayer) for module in model.modules())
    assert not model.training
    after = output(model)
    assert torch.isfinite(after).all()
    cosine = torch.nn.functional.cosine_similarity(before.flatten(), after.flatten(), dim=0)
    assert 0.98 < cosine < 1.0


def test_the_plan_can_be_had_without_weights() -> None:
    expected = quantize(network(), DYNAMIC)
    for recipe, wanted in ((DYNAMIC, expected), (STATIC, decide(network(), STATIC))):
        assert decide(network().to("meta"), recipe) == wanted


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_is_kept(training: bool) -> None:
    model = network().train(training)
    quantize(model, DYNAMIC)
    assert all(module.training is training for module in model.modules())


def check_untouched(model: nn.Module, act, error: type[BaseException], text: str) -> None:
    """`act` fails and the model is what it was."""
    state, before = snapshot(model), output(model)
    types = [type(module) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    gradients = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=text):
        act()
    assert same(snapshot(model), state)
    assert torch.equal(output(model), before)
    assert [type(module) for module in model.modules()] == types
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == gradients
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("hook", ["observe", "decide", "tune"])
@pytest.mark.parametrize("name", ["dit64", "sd32"])
def test_a_step_that_fails_leaves_the_model_as_it_was(name: str, hook: str) -> None:
    model = network(name)
    recipe = Recipe("fails", (*DYNAMIC.steps, Fails(hook)))
    check_untouched(model, lambda: quantize(model, recipe), RuntimeError, f"failed to {hook}")


def test_a_killed_calibration_leaves_the_model_as_it_was() -> None:
    model = network()
    source = Samples(model, dies_at=1)
    check_untouched(model, lambda: quantize(model, STATIC, source), KeyboardInterrupt, "killed")


def test_missing_data_leaves_the_model_as_it_was() -> None:
    model = network()
    text = "this recipe needs calibration data, and only the denoiser was given"
    check_untouched(model, lambda: quantize(model, STATIC), DQError, text)


def test_a_weight_that_is_not_finite_names_the_layer() -> None:
    model = network()
    name, layer = list(quantizable(model).items())[-1]
    layer.weight.data[0, 0] = torch.nan
    with pytest.raises(DQError, match=rf"^{name} \(Linear .*\): .* not finite; repair the model"):
        quantize(model, DYNAMIC)
    assert packed_layers(model) == {}


def test_activations_that_are_not_finite_name_the_layer() -> None:
    model = network()
    block = model.transformer_blocks[1]
    block.attn1.to_v.bias.data.fill_(torch.inf)
    text = r"transformer_blocks\.1\.attn1\.to_out\.0 .*: its input is not finite during calibration"
    with pytest.raises(DQError, match=text):
        quantize(model, STATIC, Samples(model, 1))
    assert packed_layers(model) == {}


def test_quantizing_twice_is_an_error() -> None:
    model = network()
    quantize(model, DYNAMIC)
    state = snapshot(model)
    text = "DiTTransformer2DModel is quantized already; start from the float checkpoint"
    for act in (quantize, decide):
        with pytest.raises(DQError, match=text):
            act(model, DYNAMIC)
    assert same(snapshot(model), state)


TWO_STEPS = Recipe(
    "two", (PTQ("int8", "int8", dynamic="static", input_observer="absmax"), *STATIC.steps)
)


@pytest.mark.parametrize("recipe", [STATIC, TWO_STEPS], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_a_killed_calibration_resumes_and_ends_the_same(
    tmp_path: Path, batch: int, recipe: Recipe
) -> None:
    straight = network()
    expected = quantize(straight, recipe, Samples(straight))
    model = network()
    source = Samples(model, dies_at=batch)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, recipe, source, tmp_path)
    plan = quantize(model, recipe, source, tmp_path)
    assert source.runs == [*range(batch + 1), *range(batch, 3)]  # the finished ones only once
    assert plan.to_dict() == expected.to_dict()
    assert same(snapshot(model), snapshot(straight))

    again = network()
    source = Samples(again)
    quantize(again, recipe, source, tmp_path)
    assert source.runs == []
    assert same(snapshot(again), snapshot(straight))


def test_another_job_does_not_take_over_the_work(tmp_path: Path) -> None:
    model = network()
    quantize(model, STATIC, Samples(model), tmp_path)
    other_data = dataclasses.replace(STATIC.calibration, seed=1)
    changed = network()
    changed.proj_out_1.bias.data.add_(1)
    for recipe, model in (
        (dataclasses.replace(STATIC, calibration=other_data), network()),
        (STATIC, changed),
        (STATIC, network("pixart64")),
    ):
        source = Samples(model)
        quantize(model, recipe, source, tmp_path)
        assert source.runs == [0, 1, 2]
    assert len(list(tmp_path.iterdir())) == 4


def test_what_a_step_drops_stays_float() -> None:
    model = network()
    roles = family_of(model).roles(model)
    second = PTQ("int8", "int8", dynamic="dynamic", skip_roles=("feed-forward",))
    plan = quantize(model, Recipe("two", (*DYNAMIC.steps, second)))
    assert set(packed_layers(model)) == set(plan.layers)
    assert all(roles[name] != "feed-forward" for name in plan.layers)


def test_notes_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    with caplog.at_level("INFO", logger="dq"):
        plan = quantize(model, Recipe("skips", (PTQ("int8", "int8", skip_roles=("io",)),)))
    assert plan.notes
    for name, note in plan.notes.items():
        assert f"{name}: {note}" in caplog.text
