"""Video transformers: roles, layers of time, grids, and pipelines that put out frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dq import DQPipeline
from dq.calibrate import CalibrationSpec
from dq.calls import run
from dq.family import Role, family_of, quantizable
from dq.methods.paro import PARO
from dq.methods.ptq import PTQ
from dq.nn import packed_layers
from dq.recipe import Recipe
from dq.tokens import TokenLayout
from tests.models import VIDEOS

each = pytest.mark.parametrize("name", VIDEOS)
BLOCK = {"cogvideox": "transformer_blocks", "wan": "blocks"}
ROLES = {
    "cogvideox": {
        "patch_embed.proj": Role.IO,
        "patch_embed.text_proj": Role.CAPTION,
        "time_embedding.linear_2": Role.TIME,
        "transformer_blocks.0.norm1.linear": Role.MODULATION,
        "transformer_blocks.1.attn1.to_out.0": Role.SELF_ATTENTION,
        "transformer_blocks.1.ff.net.2": Role.FEED_FORWARD,
        "norm_out.linear": Role.MODULATION,
        "proj_out": Role.IO,
    },
    "wan": {
        "condition_embedder.time_embedder.linear_1": Role.TIME,
        "condition_embedder.time_proj": Role.MODULATION,
        "condition_embedder.text_embedder.linear_2": Role.CAPTION,
        "blocks.0.attn1.to_q": Role.SELF_ATTENTION,
        "blocks.0.attn2.to_q": Role.CROSS_ATTENTION,
        "blocks.1.attn2.to_v": Role.CROSS_KV,
        "blocks.1.ffn.net.0.proj": Role.FEED_FORWARD,
        "proj_out": Role.IO,
    },
}
GRIDS = {
    "cogvideox": TokenLayout((3, 4, 4), 16, text_first=True),
    "wan": TokenLayout((3, 4, 4), 0, text_first=True),
}


def network(name: str) -> Any:
    return VIDEOS[name].network(VIDEOS[name].build()).eval()


def inputs(model: nn.Module, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return family_of(model).sample_inputs(model, 2, generator)


@each
def test_every_layer_has_its_role(name: str) -> None:
    model = network(name)
    roles = family_of(model).roles(model)
    assert set(roles) == set(quantizable(model))
    assert {layer: roles[layer] for layer in ROLES[name]} == ROLES[name]
    assert family_of(model).blocks(model) == tuple(f"{BLOCK[name]}.{i}" for i in range(2))


@each
def test_layers_of_time_see_nothing_else(name: str) -> None:
    model = network(name)
    outputs: dict[str, list[torch.Tensor]] = {}
    for layer, module in quantizable(model).items():
        module.register_forward_hook(
            lambda module, args, y, layer=layer: outputs.setdefault(layer, []).append(y)
        )
    with torch.no_grad():
        for seed in (0, 1):
            run(model, inputs(model, seed))
    same = {n for n, (one, other) in outputs.items() if torch.equal(one, other)}
    assert set(family_of(model).timed(model)) <= same


@each
def test_the_grid_is_that_of_frames_and_patches(name: str) -> None:
    model = network(name)
    assert family_of(model).layouts(model, inputs(model)) == (GRIDS[name],)


@each
def test_a_pipeline_of_videos_is_calibrated_and_draws(name: str, tmp_path: Path) -> None:
    VIDEOS[name].build().save_pretrained(tmp_path / "float")
    spec = CalibrationSpec(n=1, steps=2, batch=1, size=(9, 64, 64))
    recipe = Recipe("t", (PTQ("int8", "int8"), PARO(0.5, (16,))), spec)
    pipe: Any = DQPipeline.from_pretrained(tmp_path / "float", recipe)
    assert packed_layers(pipe.transformer)
    pipe.save_pretrained(tmp_path / "packed")
    again: Any = DQPipeline.from_pretrained(tmp_path / "packed")
    arguments = dict(VIDEOS[name].arguments)
    del arguments["max_sequence_length"]  # masks are for the pipeline's own
    drawn = [
        p(**arguments, generator=torch.Generator().manual_seed(0)).frames for p in (pipe, again)
    ]
    assert drawn[0].shape == (1, 9, 64, 64, 3)
    assert (drawn[0] == drawn[1]).all()
