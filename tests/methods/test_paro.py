"""Ordered tokens and block masks on tiny models: exact where nothing is left out, stored, named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

from dq import attention
from dq.calibrate import CalibrationSpec
from dq.calls import run
from dq.engine import quantize
from dq.errors import DQError
from dq.family import family_of
from dq.integration import attach
from dq.kernels.live_blocks import LiveBlocks
from dq.method import Method
from dq.methods.operands import Operands
from dq.methods.paro import PARO
from dq.methods.ptq import PTQ
from dq.pipelines.footprint import footprint
from dq.plan import Plan
from dq.recipe import Recipe
from dq.runtime import compile_blocks, install
from tests.models import MODELS, VIDEOS
from tests.packed import relative_error, same_state
from tests.sources import Samples

CASES = {**MODELS, **VIDEOS}
NAMES = [name for name in CASES if name not in ("sd64", "amused")]
each = pytest.mark.parametrize("name", NAMES)
SMALL = CalibrationSpec(n=2, steps=2, batch=2)


def network(name: str) -> nn.Module:
    return CASES[name].network(CASES[name].build()).eval()


def made(
    name: str,
    *steps: Method,
    work: Path | None = None,
    source: Callable[[nn.Module], Samples] = Samples,
) -> tuple[nn.Module, Plan]:
    model = network(name)
    return model, quantize(model, Recipe("t", steps, SMALL), source(model), work)


def inputs(model: nn.Module) -> dict[str, Any]:
    return family_of(model).sample_inputs(model, 2, torch.Generator().manual_seed(7))


@each
@pytest.mark.parametrize("fused", [False, True])
def test_with_every_block_nothing_changes(
    name: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LiveBlocks, "whole", False)  # else dense attention would take over
    float_model: Any = network(name)
    if fused:
        if not hasattr(float_model, "fuse_qkv_projections"):
            pytest.skip("it has no fused projections")
        float_model.fuse_qkv_projections()
    model = copy.deepcopy(float_model)
    step = PARO(1.0, (8,), "tiles", criterion="paper", alpha=0.0)  # mass is the same for all
    plan = quantize(model, Recipe("t", (step,), SMALL), Samples(model))
    sites = [attention.site_of(model.get_submodule(name)) for name in plan.attention]
    assert any(site is not None and site.token_order.any() for site in sites)
    assert plan.attention
    with torch.no_grad():
        expected, found = (run(m, inputs(model)) for m in (float_model, model))
    assert 0 < relative_error(found, expected) < 1e-5


@each
@pytest.mark.parametrize("rule", ["threshold", "top"])
def test_the_density_is_the_one_asked_for_and_text_is_whole(name: str, rule: str) -> None:
    model, plan = made(name, PARO(0.5, (8,), rule=rule))
    every = kept = whole = 0
    for site_name, spec in plan.attention.items():
        site = attention.site_of(model.get_submodule(site_name))
        assert site is not None
        assert spec.tokens is not None
        blocks = site.live().live
        every, kept = every + blocks.numel(), kept + int(blocks.sum())
        image = spec.tokens.image_blocks
        # Text and the diagonal are computed at any density.
        whole += blocks.numel() - blocks.shape[0] * (image[0] * image[1] - image[0])
        assert blocks[:, image[0] :].all()
        assert blocks[:, :, image[1] :].all()
        assert blocks.diagonal(dim1=1, dim2=2).all()
    assert kept / every == pytest.approx(max(0.5, whole / every), abs=0.03)
    with torch.no_grad():
        found = run(model, inputs(model))
    assert found.isfinite().all()


@each
def test_it_is_stored_with_the_model_and_named(name: str, tmp_path: Path) -> None:
    model, plan = made(name, PTQ("int8", "int8"), PARO(0.5, (8,)))
    attach(model, plan)
    model.save_pretrained(tmp_path)
    again: Any = type(model).from_pretrained(tmp_path)
    assert same_state(again, model)
    with torch.no_grad():
        outputs = [run(m, inputs(model)) for m in (model, again, copy.deepcopy(again))]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    count = footprint(again)
    assert {r.compute_path for r in count.attention} == {"torch's attention over gathered blocks"}
    assert sum(r.sites for r in count.attention) == len(plan.attention)
    assert count.stored_bytes == count.planned_bytes
    again.dequantize()
    assert not any(attention.SITE in key for key in again.state_dict())


def test_cross_attention_is_left_alone() -> None:
    _, plan = made("pixart64", PARO(0.5, (8,)))
    assert plan.attention
    assert all(name.endswith("attn1") for name in plan.attention)
    assert plan.notes["paro"].endswith("; 2 other attentions are left as they are")


class Given(Samples):
    """Feeds one batch, again and again."""

    def __init__(self, model: nn.Module, batch: dict[str, Any]) -> None:
        super().__init__(model)
        self.batch = batch

    @torch.no_grad()
    def run(self, spec: CalibrationSpec, batch: int) -> torch.Tensor:
        for _ in range(2):
            output = run(self.model, self.batch)
        return output


def test_a_prompt_of_as_many_tokens_as_the_image_is_no_grid() -> None:
    model = network("sd32")
    batch = inputs(model)
    batch["sample"] = torch.randn(2, 4, 4, 8)
    batch["encoder_hidden_states"] = batch["encoder_hidden_states"][:, :8]  # 2 x 4 at one level
    plan = quantize(model, Recipe("t", (PARO(0.5, (4,)),), SMALL), Given(model, batch))
    assert plan.attention
    assert all(name.endswith("attn1") for name in plan.attention)


def test_a_second_recipe_is_refused() -> None:
    model, plan = made("dit64", PARO(0.5, (8,)))
    with pytest.raises(DQError, match=r"quantized already.*dequantize"):
        quantize(model, Recipe("t", (PTQ("int8", "int8"),), SMALL), Samples(model))
    assert attention.specs_of(model) == plan.attention


def test_it_is_said_when_processors_are_replaced(caplog: pytest.LogCaptureFixture) -> None:
    model: Any
    model, plan = made("sd32", PARO(0.5, (8,)))
    with torch.no_grad(), caplog.at_level("WARNING", "dq"):
        before = run(model, inputs(model))
        with attention.exact(model):
            run(model, inputs(model))
        assert not caplog.records
        model.set_attn_processor(AttnProcessor2_0())
        for _ in range(2):
            run(model, inputs(model))
        (record,) = caplog.records
        assert f"{len(plan.attention)} attentions" in record.getMessage()
        install(model, plan.attention)
        assert torch.equal(run(model, inputs(model)), before)


@pytest.mark.parametrize("what", ["quantized", "loaded"])
def test_inference_mode(what: str, tmp_path: Path) -> None:
    model, plan = made("dit64", PARO(0.5, (8,)))
    attach(model, plan)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    with torch.inference_mode():
        if what == "loaded":
            again: Any = type(model).from_pretrained(tmp_path)  # type: ignore[attr-defined]
        else:
            again, _ = made("dit64", PARO(0.5, (8,)))
        found = run(again, inputs(again))
    with torch.no_grad():
        expected = run(model, inputs(model))
    assert relative_error(found, expected) < 1e-5


def test_timesteps_of_tokens_are_those_of_their_row() -> None:
    """A video that begins with a picture gives the tokens of that the timestep 0."""
    model, _ = made("wan", PARO(0.5, (8,), groups=2))
    batch = inputs(model)
    tokens = next(iter(attention.specs_of(model).values())).tokens
    assert tokens is not None
    every = batch["timestep"].reshape(-1, 1).expand(2, tokens.layout.tokens).clone()
    every[:, :4] = 0
    with torch.no_grad():
        found = run(model, {**batch, "timestep": every})
    assert found.isfinite().all()


def test_the_first_attentions_may_stay_whole() -> None:
    _, every = made("dit64", PARO(0.5, (8,)))
    _, fewer = made("dit64", PARO(0.5, (8,), dense=1))
    assert [*fewer.attention] == [*every.attention][1:]


def test_natural_order_is_the_only_one_if_asked_for() -> None:
    _, plan = made("dit64", PARO(0.5, (8,), orders="natural"))
    assert {spec.tokens.orders for spec in plan.attention.values() if spec.tokens} == {("hw",)}


def test_masks_follow_the_timestep() -> None:
    model, plan = made("dit64", PARO(0.4, (8,), groups=2), source=Steps)
    groups = {spec.tokens.groups for spec in plan.attention.values() if spec.tokens}
    assert groups == {(100.0, 900.0)}
    seen = []
    for timestep in (0, 100, 499, 501, 999):
        with torch.no_grad():
            run(model, {**inputs(model), "timestep": torch.full((2,), timestep)})
        site = attention.site_of(model.get_submodule(next(iter(plan.attention))))
        assert site is not None
        seen.append(site.group())
    assert seen == [0, 0, 0, 1, 1]
    mixed = {**inputs(model), "timestep": torch.tensor([100, 900])}
    with torch.no_grad():
        both = run(model, mixed)
        rows = [run(model, {k: v[i : i + 1] for k, v in mixed.items()}) for i in range(2)]
    torch.testing.assert_close(both, torch.cat(rows), rtol=1e-4, atol=1e-5)


class Steps(Samples):
    """Runs a denoiser at two timesteps."""

    @torch.no_grad()
    def run(self, spec: CalibrationSpec, batch: int) -> torch.Tensor:
        for timestep in (100, 900):
            now = {"timestep": torch.full((2,), timestep)}
            output = run(self.model, {**inputs(self.model), **now})
        return output


@pytest.mark.parametrize("formats", [("int8", "int8", "uint8"), ("int8", "e4m3", "e4m3")])
def test_operands_by_block_are_near(formats: tuple[str, str, str]) -> None:
    q, v, p = formats
    model, plan = made("dit64", PARO(1.0, (8,), query_key=q, value=v, probabilities=p))
    with torch.no_grad():
        expected, found = (run(m, inputs(model)) for m in (network("dit64"), model))
    assert 0 < relative_error(found, expected) < 0.05
    assert all(spec.by_block for spec in plan.attention.values())


@pytest.mark.parametrize("first", ["operands", "paro"])
def test_it_goes_with_operands_by_token_in_any_order(first: str) -> None:
    steps: list[Method] = [Operands(), PARO(1.0, (8,))]
    ordered = steps if first == "operands" else steps[::-1]
    model, plan = made("dit64", *ordered)
    assert all(s.has_operands and s.tokens is not None for s in plan.attention.values())
    with torch.no_grad():
        expected, found = (run(m, inputs(model)) for m in (network("dit64"), model))
    assert 0 < relative_error(found, expected) < 0.05


def test_other_sizes_are_refused() -> None:
    model, _ = made("dit64", PARO(0.5, (8,)))
    call = inputs(model)
    height, width = call["hidden_states"].shape[-2:]
    call["hidden_states"] = call["hidden_states"].reshape(2, -1, height * 2, width // 2)
    with pytest.raises(DQError, match=r"calibrated for tokens of \d+x\d+; this call has \d+x\d+"):
        run(model, call)


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    expected, _ = made("dit64", PARO(0.5, (8,)))
    with pytest.raises(KeyboardInterrupt):
        made("dit64", PARO(0.5, (8,)), work=tmp_path, source=partial(Samples, dies_at=1))
    again, _ = made("dit64", PARO(0.5, (8,)), work=tmp_path)
    assert same_state(again, expected)


def test_a_model_without_a_grid_is_refused() -> None:
    with pytest.raises(DQError, match="no attention of this UVit2DModel has tokens that form a gr"):
        made("amused", PARO(0.5, (8,)))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"density": 0.0}, "density is a share"),
        ({"density": 1.5}, "density is a share"),
        ({"orders": "tile"}, "Did you mean 'tiles'"),
        ({"criterion": "mas"}, "Did you mean 'mass'"),
        ({"rule": "thresh"}, "Did you mean 'threshold'"),
        ({"block": [8, 8, 8]}, "block is the queries and keys"),
        ({"block": [8, 12]}, "divide each other"),
        ({"alpha": 2.0}, "alpha is 0 to 1"),
        ({"groups": -1}, "groups is 0 or more"),
        ({"maps": 0}, "maps is 1 or more"),
        ({"value": "int8"}, "quantized together"),
        ({"query_key": "int88"}, "Did you mean 'int8'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(DQError, match=text):
        Recipe.from_dict({"steps": [{"method": "paro", **settings}]})


def test_recipes_go_together_with_a_plus() -> None:
    both = Recipe.get("mixdq-w4a8+paro-30-b16")
    first, second = Recipe.get("mixdq-w4a8"), Recipe.get("paro-30-b16")
    assert both.steps == (*first.steps, *second.steps)
    assert both.calibration == first.calibration
    assert both.name == "mixdq-w4a8+paro-30-b16"
    assert Recipe.is_name(both.name)
    assert not Recipe.is_name("mixdq-w4a8+paro")
    with pytest.raises(DQError, match="unknown recipe 'paro-x'"):
        Recipe.get("mixdq-w4a8+paro-x")


def test_many_blocks_compile_into_one_graph_with_masks_of_their_own() -> None:
    torch.manual_seed(0)
    model: Any = type(network("dit64"))(**{**network("dit64").config, "num_layers": 11}).eval()
    plan = quantize(model, Recipe("t", (PARO(0.4, (8,), groups=2),), SMALL), Steps(model))
    assert len(plan.attention) == 11
    with torch.no_grad():
        expected = run(model, inputs(model))
        assert compile_blocks(model, backend="eager", fullgraph=True) == 11
        torch.testing.assert_close(run(model, inputs(model)), expected, rtol=1e-4, atol=1e-5)
