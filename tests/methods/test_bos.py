"""The begin-of-sentence token through whole pipelines."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dq import DQPipeline
from dq.calibrate import CalibrationSpec
from dq.distance import psnr
from dq.family import Role, family_of
from dq.methods.bos import BOS
from dq.methods.ptq import PTQ
from dq.nn import PackedLinear, kept, packed_layers
from dq.recipe import Recipe
from tests.models import MODELS
from tests.packed import FOLDERS

SHORT = CalibrationSpec(n=4, steps=2, batch=4, prompts=("a cat", "two dogs", "rain", "a red car"))
RECIPE = Recipe("bos", (PTQ("int8", "int8", input_observer="absmax"), BOS()), SHORT)
PLAIN = dataclasses.replace(RECIPE, steps=RECIPE.steps[:1])
unets = pytest.mark.parametrize("name", ["sd32", "sdxl"])


def keeping(model: nn.Module) -> dict[str, PackedLinear]:
    return {n: m for n, m in packed_layers(model).items() if m.kept_input is not None}


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry a look at a prompt: whether any token went the long way."""
    seen: list[bool] = []
    look = kept._looked_at

    def noted(x: Tensor, every: int, reference: Tensor) -> Any:
        found = look(x, every, reference)
        seen.append(found.others)
        return found

    monkeypatch.setattr(kept, "_looked_at", noted)
    return seen


@unets
def test_static_layers_that_see_prompts_keep_the_first_token(model_folders, name: str) -> None:
    pipe = DQPipeline.from_pretrained(model_folders(name), RECIPE)
    model = pipe.unet
    roles = family_of(model).roles(model)
    assert set(keeping(model)) == {n for n, role in roles.items() if role is Role.CROSS_KV}
    length = pipe.tokenizer.model_max_length
    for layer in keeping(model).values():
        assert layer.spec.kept_every == length
        assert layer.kept_output is not None


@unets
def test_prompts_are_looked_at_once_and_go_the_short_way(
    model_folders, name: str, looks: list[bool]
) -> None:
    pipe = DQPipeline.from_pretrained(model_folders(name), RECIPE)
    looks.clear()
    MODELS[name].call(pipe, prompt=["an owl", "a tram"], num_inference_steps=3)
    # Two prompts of conditional and unconditional rows in one tensor; SDXL's empty one is zero.
    assert looks == [False]


@unets
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_an_image_does_not_depend_on_its_neighbours(
    model_folders, name: str, guidance: float
) -> None:
    pipe = DQPipeline.from_pretrained(model_folders(name), RECIPE)
    words = ["an owl", "a tram", "rain"]
    arguments: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": guidance}
    arguments["output_type"] = "np"
    seeds = [torch.Generator().manual_seed(i) for i in range(3)]
    together = pipe(words, generator=seeds, **arguments).images
    for index, word in enumerate(words):
        seed = torch.Generator().manual_seed(index)
        alone = pipe(word, generator=seed, **arguments).images
        # Not bit for bit: float products add up in another order, and codes flip next to ties.
        assert psnr(torch.tensor(together[index]), torch.tensor(alone[0])) > 35


def adapted(pipe: Any) -> dict[str, Any]:
    """Change the text encoder, as a fused adapter does."""
    for name, parameter in pipe.text_encoder.named_parameters():
        if name.endswith("v_proj.weight"):
            parameter.data.mul_(1.5)
    return {}


CHANGES = [
    ("sd32", adapted, True),
    ("sdxl", adapted, True),
    # Stable Diffusion's own pipeline cannot skip layers of the encoders of transformers 5.
    ("sdxl", lambda pipe: {"clip_skip": 1}, True),
    ("sd32", lambda pipe: {"negative_prompt": "blurred"}, False),
    ("sdxl", lambda pipe: {"negative_prompt": "blurred"}, False),
]


@pytest.mark.parametrize(("name", "change", "others"), CHANGES)
def test_changed_encoders_are_noticed(
    model_folders, name: str, change: Any, others: bool, looks: list[bool]
) -> None:
    pipe = DQPipeline.from_pretrained(model_folders(name), RECIPE)
    full = DQPipeline.from_pretrained(model_folders(name))
    looks.clear()
    case, images = MODELS[name], []
    for each in (pipe, full):
        images.append(torch.tensor(case.call(each, **change(each))))
    assert any(looks) is others
    assert psnr(*images) > 25


@unets
def test_weighted_and_long_prompts_stay_right(model_folders, name: str, looks: list[bool]) -> None:
    pipe = DQPipeline.from_pretrained(model_folders(name), RECIPE)
    full = DQPipeline.from_pretrained(model_folders(name))
    inputs = family_of(pipe.unet).sample_inputs(pipe.unet, 2, torch.Generator().manual_seed(0))
    known = next(iter(keeping(pipe.unet).values())).kept_input
    length = pipe.tokenizer.model_max_length
    prompt = torch.randn(2, 2 * length, len(known), generator=torch.Generator().manual_seed(0))
    prompt[:, 0] = known
    prompt[0, length], prompt[1, length] = known, 1.2 * known
    looks.clear()
    with torch.no_grad():
        outputs = [
            p.unet(**{**inputs, "encoder_hidden_states": prompt}, return_dict=False)[0]
            for p in (pipe, full)
        ]
    assert looks == [True]
    noise = (outputs[0] - outputs[1]).norm() / outputs[1].norm()
    assert noise < 0.1  # random vectors are no prompts that the ranges were made for


@unets
def test_it_is_saved_and_reloaded(model_folders, name: str, tmp_path, looks: list[bool]) -> None:
    pipe = DQPipeline.from_pretrained(model_folders(name), RECIPE)
    before = MODELS[name].call(pipe)
    pipe.save_pretrained(tmp_path / "packed")
    again = DQPipeline.from_pretrained(tmp_path / "packed")
    assert again.plan == pipe.plan
    assert again.recipe == RECIPE
    looks.clear()
    assert np.array_equal(MODELS[name].call(again), before)
    assert looks == [False]  # the hook is there too
    assert again.footprint().planned_bytes == pipe.footprint().planned_bytes
    again.unet.dequantize()
    assert not again.unet._forward_pre_hooks


def test_encoders_that_see_the_whole_prompt_have_no_such_token(model_folders) -> None:
    pipe = DQPipeline.from_pretrained(model_folders("sd32"))

    def mixed(module: nn.Module, args: Any, output: Any) -> Any:
        output[0][:, 0] += output[0][:, 1:].mean(1)
        return output

    pipe.text_encoder.register_forward_hook(mixed)
    plan = pipe.quantize(RECIPE)
    assert not keeping(pipe.unet)
    assert "begin with different vectors" in plan.notes["UNet2DConditionModel"]


def test_plans_without_static_cross_attention_are_left_alone(model_folders) -> None:
    for name, steps in (("sd32", PTQ("int4")), ("dit64", PTQ("int8", "int8"))):
        pipe = DQPipeline.from_pretrained(model_folders(name), Recipe("r", (steps, BOS()), SHORT))
        assert pipe.plan.notes == {} or name == "sd32"
        assert not any(spec.kept_every for spec in pipe.plan.layers.values())


_CHANNEL = 7  # of the prompt, that carries the outlier


def outlier(pipe: Any, size: float) -> Any:
    """Give the first token an outlier that full precision does not see: its weights are zero.

    So it is in CLIP: a few channels are huge there, and the layers that follow hardly use them.
    """
    roles = family_of(pipe.unet).roles(pipe.unet)
    for name in (n for n, role in roles.items() if role is Role.CROSS_KV):
        pipe.unet.get_submodule(name).weight.data[:, _CHANNEL] = 0

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        output[0][:, 0, _CHANNEL] = size
        return output

    pipe.text_encoder.register_forward_hook(hook)
    return pipe


def quality(size: float, recipe: Recipe) -> float:
    """Mean PSNR in dB of four images of the trained UNet to full precision."""

    def draw(pipe: Any) -> Tensor:
        seeds = [torch.Generator().manual_seed(i) for i in range(4)]
        words = ["red apple", "cat", "rocket", "car"]
        images = pipe(words, num_inference_steps=6, generator=seeds, output_type="np").images
        return torch.tensor(images)

    full = draw(outlier(DQPipeline.from_pretrained(FOLDERS["emoji-unet"]), size))
    pipe = outlier(DQPipeline.from_pretrained(FOLDERS["emoji-unet"]), size)
    pipe.quantize(recipe)
    return float(np.mean([psnr(a, b) for a, b in zip(draw(pipe), full, strict=True)]))


def test_an_outlier_ruins_static_ranges_and_the_rule_repairs_them() -> None:
    calibration = CalibrationSpec(n=8, steps=4)
    with_rule, without = (dataclasses.replace(r, calibration=calibration) for r in (RECIPE, PLAIN))
    unscaled = quality(0.0, with_rule)
    large = 50 * 8.5  # the norm of the other tokens is 8.3 to 10.2
    assert quality(large, without) < unscaled - 10
    assert abs(quality(large, with_rule) - unscaled) < 1
