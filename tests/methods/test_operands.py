"""Attention with quantized operands, from the recipe to the report."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from dq import DQPipeline, attention
from dq.errors import DQError
from dq.methods.operands import Operands
from tests.models import MODELS
from tests.models.parts import finish
from tests.packed import CASES, forward, met, relative_error

RECIPE = {
    "name": "t",
    "steps": [{"method": "ptq", "weights": "int8"}, {"method": "operands"}],
}


@pytest.mark.parametrize("name", CASES)
def test_every_attention_is_quantized_saved_and_reported(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder = tmp_path / "float"
    case.build().save_pretrained(folder)
    plain = DQPipeline.from_pretrained(folder, {**RECIPE, "steps": RECIPE["steps"][:1]})
    pipe = finish(DQPipeline.from_pretrained(folder, RECIPE))
    model = pipe.denoiser
    assert pipe.plan.attention.keys() == set(attention.sites(model))
    exact, found = forward(plain.denoiser, **met(name)), forward(model, **met(name))
    assert 0 < relative_error(found, exact) < 0.05
    pipe.save_pretrained(tmp_path / "packed")
    again = finish(DiffusionPipeline.from_pretrained(tmp_path / "packed"))
    assert torch.equal(forward(case.network(again), **met(name)), found)
    sites = len(pipe.plan.attention)
    line = f"attention q k int8, p uint8 v int8: simulated, {sites} sites"
    assert line in pipe.summary()
    assert "attention" not in plain.summary().partition("compute")[0]
    model.dequantize()
    assert not any(
        hasattr(m.processor, "_dq_spec") for m in model.modules() if hasattr(m, "processor")
    )


def test_formats_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DQError, match="probabilities alone are unsigned"):
        Operands(probabilities="int8")
    with pytest.raises(DQError, match="quantized together"):
        Operands(value="float")
    with pytest.raises(DQError, match="changes nothing"):
        Operands("float", "float", "float")
    assert str(Operands("int4", "float", "float").spec()) == "q k int4, p v float"


def test_a_plan_for_another_model_is_refused() -> None:
    model = MODELS["sd32"].network(MODELS["sd32"].build())
    with pytest.raises(DQError, match="unknown attention of this UNet2DConditionModel 'nowhere'"):
        attention.install(model, {"nowhere": Operands().spec()})
