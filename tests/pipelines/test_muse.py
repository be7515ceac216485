from typing import Any

import numpy as np
import pytest
import torch

from dq.calibrate import Calibration, CalibrationSpec
from dq.calls import run
from dq.family import Role, families, family_of, quantizable
from dq.pipelines.draw import PipelineSource, draw
from dq.pipelines.noise import NoiseSource
from tests.models import MODELS
from tests.pipelines.splits import concatenated_inputs, sample

MODEL: Any = MODELS["amused"].build().transformer
BLOCK, SIDE = "transformer_layers.1", "up_block.attention_blocks.0"
ROLES = {
    "embed.conv": Role.IO,
    "mlm_layer.conv1": Role.IO,
    "mlm_layer.conv2": Role.IO,
    "cond_embed.linear_1": Role.TIME,
    "encoder_proj": Role.CAPTION,
    f"{SIDE}.kv_mapper": Role.CAPTION,
    f"{SIDE}.attn1.to_q": Role.CROSS_ATTENTION,
    f"{SIDE}.attn1.to_k": Role.CROSS_KV,
    f"{SIDE}.attn2.to_v": Role.CROSS_KV,
    f"{SIDE}.attn2.to_out.0": Role.CROSS_ATTENTION,
    "project_to_hidden": Role.PROJECTION,
    "project_from_hidden": Role.PROJECTION,
    f"{BLOCK}.norm1.linear": Role.MODULATION,
    f"{BLOCK}.attn1.to_k": Role.SELF_ATTENTION,
    f"{BLOCK}.attn2.to_q": Role.CROSS_ATTENTION,
    f"{BLOCK}.attn2.to_k": Role.CROSS_KV,
    f"{BLOCK}.ff.net.2": Role.FEED_FORWARD,
    "down_block.downsample.conv": Role.CONVOLUTION,
    "down_block.res_blocks.0.depthwise": Role.CONVOLUTION,
    "down_block.res_blocks.0.channelwise_linear_1": Role.FEED_FORWARD,
    "down_block.res_blocks.0.cond_embeds_mapper": Role.MODULATION,
}


def test_every_layer_has_its_role() -> None:
    roles = family_of(MODEL).roles(MODEL)
    assert set(roles) == set(quantizable(MODEL))
    assert {layer: roles[layer] for layer in ROLES} == ROLES


def test_layers_see_the_text_if_their_role_says_so() -> None:
    roles, tokens = family_of(MODEL).roles(MODEL), {}
    for name, layer in quantizable(MODEL).items():
        layer.register_forward_pre_hook(
            lambda module, args, name=name: tokens.__setitem__(name, args[0].shape[1])
        )
    with torch.no_grad():
        run(MODEL, sample(MODEL))
    for layer in quantizable(MODEL).values():
        layer._forward_pre_hooks.clear()
    see_text = {name for name, count in tokens.items() if count == 77}
    assert see_text == {n for n, r in roles.items() if r in (Role.CAPTION, Role.CROSS_KV)}


def test_no_layer_sees_a_concatenation() -> None:
    roles = family_of(MODEL).roles(MODEL)
    found = [name for name in concatenated_inputs(MODEL) if roles[name] != Role.TIME]
    assert found == []
    assert family_of(MODEL).splits(MODEL) == {}


def test_blocks_are_there_and_in_order() -> None:
    blocks = family_of(MODEL).blocks(MODEL)
    order: list[str] = []
    handles = [
        MODEL.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs, name=name: order.append(name), with_kwargs=True
        )
        for name in blocks
    ]
    with torch.no_grad():
        run(MODEL, sample(MODEL))
    for handle in handles:
        handle.remove()
    assert tuple(order) == blocks
    assert blocks == ("down_block", "transformer_layers.0", "transformer_layers.1", "up_block")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sample_inputs_run_and_logits_are_where_the_family_says(dtype: torch.dtype) -> None:
    model = type(MODEL).from_config(MODEL.config).to(dtype)
    inputs = sample(model)
    mask = MODELS["amused"].build().scheduler.config.mask_token_id
    assert 0.2 < (inputs["input_ids"] == mask).float().mean() < 0.8
    with torch.no_grad():
        y = run(model, inputs)
    assert y.shape == (2, MODEL.config.codebook_size, 8, 8)
    assert y.dtype == dtype
    assert y.shape[family_of(model).logits_axis or 0] == MODEL.config.codebook_size


def test_only_models_of_tokens_have_logits() -> None:
    assert {n for n, family in families.items() if family.logits_axis is not None} == {"muse"}


def test_sample_inputs_have_the_form_of_what_a_pipeline_gives() -> None:
    pipe: Any = MODELS["amused"].build()
    spec = CalibrationSpec(n=1, steps=2, batch=1)
    calibration = Calibration(pipe.transformer, PipelineSource(pipe), spec)
    (calls,) = calibration.batches()
    inputs = sample(pipe.transformer)
    for call in calls:
        assert call.keys() == inputs.keys()
        for name, value in call.items():
            assert value.shape == inputs[name].shape, name  # with and without the prompt: two rows
            assert value.dtype == inputs[name].dtype, name


def test_a_seed_belongs_to_an_image_whatever_is_drawn_beside_it() -> None:
    pipe = MODELS["amused"].build()
    prompts, options = ["an owl", "a tram", "a fox"], {"steps": 3, "output_type": "latent"}
    together = draw(pipe, prompts, seeds=[1, 2, 3], batch=3, **options)
    assert len(together) == 3
    assert together[0].dtype == torch.int64
    (alone,) = draw(pipe, prompts[1:2], seeds=[2], batch=3, **options)
    assert torch.equal(together[1], alone)
    (other,) = draw(pipe, prompts[1:2], seeds=[3], batch=3, **options)
    assert not torch.equal(alone, other)


def test_noise_needs_no_timestep() -> None:
    seen: list[torch.Tensor] = []
    source, spec = NoiseSource(MODEL), CalibrationSpec(n=3, steps=2, batch=2)
    hook = MODEL.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(inputs["input_ids"]), with_kwargs=True
    )
    outputs = [source.run(spec, batch) for batch in range(source.batches(spec))]
    hook.remove()
    assert [len(y) for y in outputs] == [2, 1]
    assert [len(x) for x in seen] == [2, 2, 1, 1]
    assert not torch.equal(seen[0], seen[1])


def test_images_are_decoded_from_codes() -> None:
    pipe = MODELS["amused"].build()
    source, spec = PipelineSource(pipe), CalibrationSpec(n=3, steps=2, batch=2)
    codes, images = source.run(spec, 0), source.images(spec, 0)
    assert codes.shape == (2, 8, 8)
    assert torch.equal(codes, codes.round())
    assert codes.max() < MODEL.config.codebook_size  # nothing is masked in the end
    assert images.shape == (2, 3, 32, 32)
    assert np.isfinite(images.numpy()).all()
