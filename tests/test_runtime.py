"""What makes quantized denoisers fast changes no number, or says which."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dq import DQError, DQPipeline, runtime
from dq.family import Role, family_of
from dq.kernels.native import library
from dq.nn import PackedLayer, keep_int8, packed_layers
from tests.models import MODELS
from tests.packed import FOLDERS, forward, static

unet = pytest.mark.parametrize("recipe", ["w8a8-dynamic", static(4)], ids=["w8", "w4"])


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the layers whose kernels ran, in order; filled after `watch`."""
    return []


def watch(model: nn.Module, runs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, layer in packed_layers(model).items():
        run = layer.run

        def noted(kernel, x, name=name, run=run):
            runs.append(name)
            return run(kernel, x)

        monkeypatch.setattr(layer, "run", noted)


def pipeline(model_folders, recipe, name: str = "sd32"):
    return DQPipeline.from_pretrained(model_folders(name), recipe, dtype=torch.bfloat16)


@unet
def test_prompts_are_projected_once_and_images_stay_the_same(
    model_folders, recipe, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipeline(model_folders, recipe)
    model, case = pipe.unet, MODELS["sd32"]
    roles = family_of(model).roles(model)
    texts = {name for name in packed_layers(model) if roles[name] is Role.CROSS_KV}
    assert texts
    watch(model, runs, monkeypatch)
    once = case.call(pipe, num_inference_steps=4)
    assert all(runs.count(name) == (1 if name in texts else 4) for name in packed_layers(model))
    runs.clear()
    pipe.remember_prompts(False)
    always = case.call(pipe, num_inference_steps=4)
    assert all(runs.count(name) == 4 for name in packed_layers(model))
    assert np.array_equal(once, always)


def test_what_is_remembered_is_forgotten_in_time(model_folders) -> None:
    model = pipeline(model_folders, "w8a8-dynamic").unet
    name = next(n for n, layer in packed_layers(model).items() if layer.remembers)
    layer = model.get_submodule(name)
    x = torch.randn(1, 7, layer.in_features).bfloat16()
    with torch.no_grad():
        first = layer(x)
        assert layer(x) is first
        assert layer(x.clone()) is not first
        x.mul_(2)
        assert not torch.equal(layer(x), first)
        second = layer(x)
        layer.weight.data.flip(0)
        layer.weight.copy_(layer.weight.flip(0))
        assert not torch.equal(layer(x), second)
        layer.remembers = False
        assert layer(x) is not layer(x)
    assert layer(x.requires_grad_()).requires_grad


def test_inference_mode_does_without(model_folders) -> None:
    model = pipeline(model_folders, "w8a8-dynamic").unet
    with torch.inference_mode():
        one, two = forward(model), forward(model)
    assert torch.equal(one, two)


def test_shared_inputs_are_quantized_once(model_folders, monkeypatch: pytest.MonkeyPatch) -> None:
    from dq.kernels import onednn

    made = []

    def noted(x, a, affine):
        made.append(tuple(x.shape))
        return original(x, a, affine)

    original = onednn.quantized
    model = pipeline(model_folders, static(8)).unet
    attn = next(m for n, m in model.named_modules() if n.endswith("attn1"))
    x = torch.randn(2, 300, attn.to_q.in_features).bfloat16()
    with torch.no_grad():
        expected = [layer(x.clone()) for layer in (attn.to_q, attn.to_k, attn.to_v)]
        monkeypatch.setattr(onednn, "quantized", noted)
        monkeypatch.setattr(onednn, "_few", lambda rows, a: False)
        found = [layer(x) for layer in (attn.to_q, attn.to_k, attn.to_v)]
        assert len(made) == 1
        x.add_(1)
        attn.to_q(x)
        assert len(made) == 2
    for y, z in zip(found, expected, strict=True):
        assert torch.equal(y, z)


@unet
def test_int8_copies_are_kept_or_not_with_the_same_result(model_folders, recipe) -> None:
    pipe = pipeline(model_folders, recipe)
    layers = packed_layers(pipe.unet).values()
    outputs, extra = [], []
    for keep in (True, False):
        pipe.keep_int8(keep)
        outputs.append(forward(pipe.unet))
        extra.append(sum(layer.resident_bytes() - layer.stored_bytes() for layer in layers))
    assert torch.equal(*outputs)
    assert extra[0] > 0
    if library() is not None:
        assert extra[1] == 0
        assert pipe.footprint().scratch_bytes > 0
        assert "scratch" in pipe.summary()


def test_defaults_keep_what_is_no_smaller_otherwise(model_folders) -> None:
    for recipe, keep in (("w8a8-dynamic", True), ("w4a8-dynamic", False)):
        model = pipeline(model_folders, recipe, "dit64").transformer
        by_bits = {layer.spec.weight.grid.bits: layer for layer in packed_layers(model).values()}
        assert by_bits[int(recipe[1])].keep_int8 is keep
        keep_int8(model, not keep)
        assert by_bits[int(recipe[1])].keep_int8 is not keep


def test_dequantize_takes_everything_away(model_folders) -> None:
    model = pipeline(model_folders, "w8a8-dynamic").unet
    assert any(
        hasattr(m.processor, "_dq_original") for m in model.modules() if hasattr(m, "processor")
    )
    model.dequantize()
    assert not any(isinstance(m, PackedLayer) for m in model.modules())
    assert all(type(m).__module__.startswith(("torch", "diffusers")) for m in model.modules())
    assert not any(hasattr(getattr(m, "processor", None), "_dq_original") for m in model.modules())


def test_families_that_are_not_installed_do_not_stop_a_model(
    model_folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pipeline(model_folders, "w8a8-dynamic").unet

    def unknown(model: nn.Module) -> None:
        raise DQError("no family describes it")

    monkeypatch.setattr(runtime, "family_of", unknown)
    runtime.install(model)
    assert forward(model).isfinite().all()


@pytest.mark.parametrize("name", ["dit64", "sd32"])
def test_blocks_are_compiled(model_folders, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    asked = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: asked.append(options))
    pipe = pipeline(model_folders, "w8a8-dynamic", name)
    assert pipe.compile_blocks(dynamic=False) == len(asked) >= 1
    assert asked[0] == {"fullgraph": True, "dynamic": False}


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
def test_compiled_checkpoints_do_not_recompile_over_steps_and_prompts(name: str) -> None:
    pipe = DQPipeline.from_pretrained(name, "w8a8", dtype=torch.bfloat16)
    texts = "prompt" if name == "emoji-unet" else "class_labels"
    one, two = ("red apple", "blue car") if texts == "prompt" else ([3], [7])

    def draw(value):
        generator = torch.Generator().manual_seed(0)
        options = {texts: value, "num_inference_steps": 3, "output_type": "np"}
        return pipe(**options, generator=generator).images

    expected = draw(one)
    torch._dynamo.reset()
    pipe.denoiser.compile(fullgraph=True)
    found = draw(one)
    with torch._dynamo.config.patch(error_on_recompile=True):
        draw(two)
        assert np.array_equal(draw(one), found)
    assert np.abs(found - expected).mean() < 0.02
