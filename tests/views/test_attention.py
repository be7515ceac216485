"""The page of attention maps: what it says is what is stored and computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dq import DQError, DQPipeline, attention
from dq.calibrate import CalibrationSpec
from dq.methods.paro import PARO
from dq.recipe import Recipe
from dq.views.attention import run
from tests.models import MODELS


@pytest.mark.parametrize("name", ["sd32", "dit64", "sd3"])
def test_the_page_tells_orders_densities_and_what_is_kept(name: str, tmp_path: Path) -> None:
    MODELS[name].build().save_pretrained(tmp_path / "float")
    recipe = Recipe("t", (PARO(0.5, (8,), groups=1),), CalibrationSpec(n=1, steps=2, batch=1))
    pipe = DQPipeline.from_pretrained(tmp_path / "float", recipe)
    views = run(pipe, tmp_path / "page.html", heads=2, steps=2)
    assert {view.name for view in views} == set(pipe.plan.attention)
    for view in views:
        site = attention.site_of(pipe.denoiser.get_submodule(view.name))
        assert site is not None
        assert sum(view.orders.values()) == site.spec.heads
        wanted = site.live().live.float().mean((1, 2))
        torch.testing.assert_close(torch.tensor(view.density), wanted)
        # Random weights attend to everything alike: blocks hold about their share.
        torch.testing.assert_close(torch.tensor(view.kept), wanted, rtol=0, atol=0.1)
    text = (tmp_path / "page.html").read_text()
    assert text.count("data:image/png") == len(views)
    assert all(view.name in text for view in views)


def test_a_model_without_ordered_tokens_is_refused(tmp_path: Path) -> None:
    MODELS["dit64"].build().save_pretrained(tmp_path / "float")
    pipe = DQPipeline.from_pretrained(tmp_path / "float")
    with pytest.raises(DQError, match="use a recipe such as paro-50"):
        run(pipe, tmp_path / "page.html")
