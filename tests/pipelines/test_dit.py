import pytest
import torch

from dq.family import Role, family_of, quantizable
from tests.models import MODELS
from tests.pipelines.splits import concatenated_inputs, sample

NETWORKS = {name: MODELS[name].network(MODELS[name].build()) for name in ("dit64", "pixart64")}
each = pytest.mark.parametrize("model", NETWORKS.values(), ids=NETWORKS)

BLOCK = "transformer_blocks.1"
ROLES = {
    "dit64": {
        "pos_embed.proj": Role.IO,
        "proj_out_1": Role.MODULATION,
        "proj_out_2": Role.IO,
        f"{BLOCK}.norm1.emb.timestep_embedder.linear_1": Role.TIME,
        f"{BLOCK}.norm1.linear": Role.MODULATION,
        f"{BLOCK}.attn1.to_out.0": Role.SELF_ATTENTION,
        f"{BLOCK}.ff.net.2": Role.FEED_FORWARD,
    },
    "pixart64": {
        "pos_embed.proj": Role.IO,
        "proj_out": Role.IO,
        "adaln_single.emb.timestep_embedder.linear_2": Role.TIME,
        "adaln_single.linear": Role.MODULATION,
        "caption_projection.linear_1": Role.CAPTION,
        f"{BLOCK}.attn1.to_q": Role.SELF_ATTENTION,
        f"{BLOCK}.attn2.to_q": Role.CROSS_ATTENTION,
        f"{BLOCK}.attn2.to_v": Role.CROSS_KV,
        f"{BLOCK}.ff.net.0.proj": Role.FEED_FORWARD,
    },
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_has_its_role(name: str) -> None:
    model = NETWORKS[name]
    roles = family_of(model).roles(model)
    assert set(roles) == set(quantizable(model))
    assert {layer: roles[layer] for layer in ROLES[name]} == ROLES[name]


@each
def test_no_layer_sees_a_concatenation(model) -> None:
    roles = family_of(model).roles(model)
    found = [name for name in concatenated_inputs(model) if roles[name] != Role.TIME]
    assert found == []
    assert family_of(model).splits(model) == {}


@each
def test_blocks_are_all_blocks(model) -> None:
    blocks = family_of(model).blocks(model)
    assert blocks == ("transformer_blocks.0", "transformer_blocks.1")


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sample_inputs_run(model, dtype) -> None:
    model = type(model).from_config(model.config).to(dtype)
    with torch.no_grad():
        y = model(**sample(model), return_dict=False)[0]
    assert y.shape == (2, 8, 16, 16)
    assert y.dtype == dtype
