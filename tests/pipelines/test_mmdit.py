import pytest
import torch

from dq.family import Role, family_of, quantizable
from tests.models import MODELS
from tests.pipelines.splits import concatenated_inputs, sample

NETWORKS = {name: MODELS[name].network(MODELS[name].build()) for name in ("sd3", "flux")}
each = pytest.mark.parametrize("model", NETWORKS.values(), ids=NETWORKS)

COMMON = {
    "proj_out": Role.IO,
    "context_embedder": Role.CAPTION,
    "time_text_embed.timestep_embedder.linear_1": Role.TIME,
    "time_text_embed.text_embedder.linear_2": Role.TIME,
    "norm_out.linear": Role.MODULATION,
    "transformer_blocks.0.norm1.linear": Role.MODULATION,
    "transformer_blocks.0.norm1_context.linear": Role.MODULATION,
    "transformer_blocks.0.attn.to_q": Role.SELF_ATTENTION,
    "transformer_blocks.0.attn.add_k_proj": Role.SELF_ATTENTION,
    "transformer_blocks.0.ff.net.2": Role.FEED_FORWARD,
    "transformer_blocks.0.ff_context.net.0.proj": Role.FEED_FORWARD,
}
ROLES = {
    "sd3": COMMON | {"pos_embed.proj": Role.IO},
    "flux": COMMON
    | {
        "x_embedder": Role.IO,
        "single_transformer_blocks.0.norm.linear": Role.MODULATION,
        "single_transformer_blocks.0.attn.to_v": Role.SELF_ATTENTION,
        "single_transformer_blocks.0.proj_mlp": Role.FEED_FORWARD,
        "single_transformer_blocks.0.proj_out": Role.FEED_FORWARD,
    },
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_has_its_role(name: str) -> None:
    model = NETWORKS[name]
    roles = family_of(model).roles(model)
    assert set(roles) == set(quantizable(model))
    assert {layer: roles[layer] for layer in ROLES[name]} == ROLES[name]


@each
def test_splits_are_the_concatenations_that_run(model) -> None:
    family = family_of(model)
    roles = family.roles(model)
    found = concatenated_inputs(model)
    found = {name: sizes for name, sizes in found.items() if roles[name] != Role.TIME}
    assert family.splits(model) == found
    assert bool(found) == hasattr(model, "single_transformer_blocks")


def test_blocks_come_in_the_order_in_which_they_run() -> None:
    blocks = {name: family_of(model).blocks(model) for name, model in NETWORKS.items()}
    assert blocks["sd3"] == ("transformer_blocks.0", "transformer_blocks.1")
    first = blocks["flux"].index("single_transformer_blocks.0")
    assert all(name.startswith("transformer_blocks") for name in blocks["flux"][:first])
    assert all(name.startswith("single_transformer") for name in blocks["flux"][first:])
    for name, model in NETWORKS.items():
        assert all(model.get_submodule(block) for block in blocks[name])


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sample_inputs_run(model, dtype) -> None:
    model = type(model).from_config(model.config).to(dtype)
    inputs = sample(model)
    with torch.no_grad():
        y = model(**inputs, return_dict=False)[0]
    assert y.shape == inputs["hidden_states"].shape
    assert y.dtype == dtype
