import pytest
import torch

from dq.family import Role, family_of, quantizable
from tests.models import MODELS
from tests.pipelines.splits import concatenated_inputs, sample

NETWORKS = {
    name: case.network(case.build()) for name, case in MODELS.items() if case.denoiser == "unet"
}
each = pytest.mark.parametrize("model", NETWORKS.values(), ids=NETWORKS)

ROLES = {
    "conv_in": Role.IO,
    "conv_out": Role.IO,
    "time_embedding.linear_1": Role.TIME,
    "mid_block.resnets.0.time_emb_proj": Role.TIME,
    "mid_block.resnets.0.conv1": Role.CONVOLUTION,
    "down_blocks.0.downsamplers.0.conv": Role.CONVOLUTION,
    "up_blocks.0.upsamplers.0.conv": Role.CONVOLUTION,
    "up_blocks.0.resnets.0.conv_shortcut": Role.SKIP,
    "down_blocks.1.resnets.0.conv_shortcut": Role.CONVOLUTION,  # one source, nothing concatenated
    "mid_block.attentions.0.proj_in": Role.PROJECTION,
    "mid_block.attentions.0.proj_out": Role.PROJECTION,
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0": Role.SELF_ATTENTION,
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_q": Role.CROSS_ATTENTION,
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": Role.CROSS_KV,
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": Role.FEED_FORWARD,
}


@each
def test_every_layer_has_its_role(model) -> None:
    roles = family_of(model).roles(model)
    assert set(roles) == set(quantizable(model))
    assert {name: roles[name] for name in ROLES} == ROLES


def test_sdxl_has_roles_for_size_and_pooled_text() -> None:
    roles = family_of(NETWORKS["sdxl"]).roles(NETWORKS["sdxl"])
    assert roles["add_embedding.linear_1"] == Role.TIME


@each
def test_splits_are_the_concatenations_that_run(model) -> None:
    family = family_of(model)
    roles, splits = family.roles(model), family.splits(model)
    found = concatenated_inputs(model)
    # Embeddings concatenate sines and cosines, which have one range.
    found = {name: sizes for name, sizes in found.items() if roles[name] != Role.TIME}
    assert found
    assert splits == found
    assert all(roles[name] == Role.SKIP for name in splits)


@each
def test_blocks_are_there_and_in_order(model) -> None:
    blocks = family_of(model).blocks(model)
    order: list[str] = []
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: order.append(name)
        )
        for name in blocks
    ]
    with torch.no_grad():
        model(**sample(model))
    for handle in handles:
        handle.remove()
    assert tuple(order) == blocks
    assert "mid_block" in blocks


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sample_inputs_run(model, dtype) -> None:
    model = type(model).from_config(model.config).to(dtype)
    with torch.no_grad():
        y = model(**sample(model), return_dict=False)[0]
    assert y.shape == (2, 4, 16, 16)
    assert y.dtype == dtype
