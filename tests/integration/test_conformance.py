"""The list that diffusers checks its own quantizers by (QuantizationTesterMixin), on the CPU.

Two of its items are not ours to meet. `num_parameters()` counts the elements of parameters, hence
bytes of packed codes: only `footprint().parameters` is the float model's count, as with every other
quantizer of 4 bits but bitsandbytes, which has a special case in diffusers. And `device_map="auto"`
needs a model's own `_no_split_modules`, which DiT has not got.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model
from torch import nn

from dq import DQConfig, DQPipeline
from dq.calls import run
from dq.family import family_of, quantizable
from dq.nn import packed_layers
from dq.pipelines.footprint import footprint
from tests.models.parts import finish
from tests.packed import CASES, RECIPES, forward, met, relative_error, same_state

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Random weights lose more than trained ones; a truncated weight or a lost scale gives 0.9 and more.
MOST_ERROR = {"w8a8-dynamic": 0.08, "w4a8-static": 0.3, "w4a16": 0.3}

Folders = Callable[[str, str], Path]

each_case = pytest.mark.parametrize("name", CASES)
each_recipe = pytest.mark.parametrize("recipe", RECIPES)


def load(name: str, folder: Path, **kwargs: Any) -> nn.Module:
    """Loads the denoiser alone, by diffusers' own call."""
    kind = type(CASES[name].network(CASES[name].build()))
    model: nn.Module = kind.from_pretrained(folder, subfolder=CASES[name].denoiser, **kwargs)
    return model


@each_recipe
@each_case
def test_layers_sizes_and_output(name: str, recipe: str, packed_folders: Folders) -> None:
    original = CASES[name].network(CASES[name].build())
    model = load(name, packed_folders(name, recipe))
    config = model.config["quantization_config"]
    # Every layer is packed, or the plan says why not.
    packed = packed_layers(model)
    assert packed.keys() == config.plan.layers.keys()
    float_layers = quantizable(original).keys() - packed.keys()
    assert float_layers <= config.plan.notes.keys()
    assert len(packed) > 3 * len(float_layers)
    # The count of parameters is the float model's, whatever codes take.
    count = footprint(model)
    assert count.parameters == original.num_parameters()
    in_memory = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    computed = in_memory.keys() - model.state_dict().keys()  # DiT's positions
    assert model.get_memory_footprint() == count.stored_bytes + sum(
        in_memory[k].nbytes for k in computed
    )
    assert count.stored_bytes == count.planned_bytes
    # Half of the DiT fixture is its table of 1000 classes, which stays float.
    assert original.get_memory_footprint() / count.stored_bytes > 1.7
    output = forward(model, **met(name))
    assert torch.isfinite(output).all()
    assert 0 < relative_error(output, forward(original, **met(name))) < MOST_ERROR[recipe]


@each_case
def test_casts_are_refused(name: str, packed_folders: Folders) -> None:
    model = load(name, packed_folders(name, "w4a16"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for cast in (
        lambda: model.to(torch.float16),
        lambda: model.to("cpu", torch.float16),
        lambda: model.to(device="cpu", dtype=torch.float16),
        lambda: model.float(),
        lambda: model.half(),
    ):
        with pytest.raises(ValueError, match="uantized"):
            cast()
    model.to("cpu")
    after = model.state_dict()
    assert all(torch.equal(after[k], v) and after[k].dtype == v.dtype for k, v in before.items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_recipe
@each_case
def test_saved_and_reloaded_bit_for_bit(
    name: str, recipe: str, dtype: torch.dtype, packed_folders: Folders, tmp_path: Path
) -> None:
    case = CASES[name]
    folder = packed_folders(name, recipe)
    pipe = finish(DiffusionPipeline.from_pretrained(folder, dtype=dtype))
    pipe.save_pretrained(tmp_path)
    again = finish(DiffusionPipeline.from_pretrained(tmp_path, dtype=dtype))
    first, second = case.network(pipe), case.network(again)
    assert first.dtype == second.dtype == dtype
    assert same_state(first, second)
    # No dtype that a model passes through may touch its codes and scales.
    stored = load(name, folder).state_dict()
    for layer in packed_layers(second):
        for leaf, tensor in second.get_submodule(layer).state_dict().items():
            if leaf != "bias":
                assert torch.equal(tensor, stored[f"{layer}.{leaf}"]), f"{layer}.{leaf}"
    image = case.call(pipe)
    assert np.isfinite(image).all()
    assert np.array_equal(image, case.call(again))


@each_recipe
@each_case
def test_shards(name: str, recipe: str, packed_folders: Folders, tmp_path: Path) -> None:
    folder = packed_folders(name, recipe)
    model = load(name, folder)
    target = tmp_path / CASES[name].denoiser
    model.save_pretrained(target, max_shard_size=model.get_memory_footprint() // 2)
    assert len(list(target.glob("*.safetensors"))) > 1
    assert same_state(model, load(name, tmp_path))


@each_case
def test_config(name: str, packed_folders: Folders, model_folders: Callable[[str], Path]) -> None:
    on_the_fly = load(name, model_folders(name), quantization_config=DQConfig("w4a16"))
    in_place = CASES[name].network(
        DQPipeline.from_pretrained(model_folders(name), RECIPES["w4a8-static"])
    )
    for model in (load(name, packed_folders(name, "w4a16")), on_the_fly, in_place):
        config = model.config["quantization_config"]
        for method in ("to_dict", "to_diff_dict", "to_json_string"):
            assert "plan" in getattr(config, method)()
        assert DQConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
        assert model.config["_pre_quantization_dtype"] == torch.float32
        assert "_pre_quantization_dtype" not in model.to_json_string()
        assert model.is_quantized
        assert model.hf_quantizer.is_serializable is True
        assert model.hf_quantizer.is_trainable is True
        assert model.hf_quantizer.is_compileable is True


@each_case
def test_layers_can_be_skipped(name: str, model_folders: Callable[[str], Path]) -> None:
    def quantized(*roles: str) -> nn.Module:
        steps = [{"method": "ptq", "weights": "int4", "skip_roles": list(roles)}]
        config = DQConfig({"name": "skips", "steps": steps})
        return load(name, model_folders(name), quantization_config=config)

    full, skipped = quantized(), quantized("io", "feed-forward")
    left = packed_layers(full).keys() - packed_layers(skipped).keys()
    assert left
    notes = skipped.config["quantization_config"].plan.notes
    assert all("skipped" in notes[layer] for layer in left)
    assert all(type(skipped.get_submodule(layer)) in (nn.Linear, nn.Conv2d) for layer in left)
    assert skipped.get_memory_footprint() > full.get_memory_footprint()
    assert torch.isfinite(forward(skipped)).all()


@each_case
def test_device_maps_leave_nothing_on_meta(name: str, packed_folders: Folders) -> None:
    folder = packed_folders(name, "w4a8-static")
    expected = forward(load(name, folder))
    maps: list[Any] = [{"": "cpu"}, "cpu"]
    if CASES[name].network(CASES[name].build())._no_split_modules:
        maps.append("auto")
    for device_map in maps:
        model = load(name, folder, device_map=device_map)
        assert not any(tensor.is_meta for tensor in model.state_dict().values())
        assert torch.equal(forward(model), expected)


@each_recipe
@each_case
def test_dequantizes(name: str, recipe: str, packed_folders: Folders, tmp_path: Path) -> None:
    model = load(name, packed_folders(name, recipe))
    before = forward(model, **met(name))
    model.dequantize()
    assert not packed_layers(model)
    assert not getattr(model, "is_quantized", False)
    # Inputs are float again, weights keep their error.
    assert relative_error(forward(model, **met(name)), before) < 0.08
    # Saved again it is an ordinary float checkpoint.
    target = tmp_path / CASES[name].denoiser
    model.save_pretrained(target)
    assert "quantization_config" not in (target / "config.json").read_text()
    assert same_state(load(name, tmp_path), model)


@each_recipe
@each_case
def test_adapters_train(name: str, recipe: str, packed_folders: Folders) -> None:
    model = load(name, packed_folders(name, recipe))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = forward(model)
    unload = _add_adapter(model)
    assert torch.equal(forward(model), expected)  # a new adapter adds nothing
    model.train()
    adapters = {k: v for k, v in model.named_parameters() if v.requires_grad}
    assert adapters
    assert all("lora_" in k for k in adapters)
    optimizer = torch.optim.SGD(adapters.values(), lr=1e-2)
    for _ in range(2):  # matrix A has no gradient before B has moved
        optimizer.zero_grad()
        _loss(model).backward()
        optimizer.step()
    reached = [k for k, v in adapters.items() if v.grad is not None and v.grad.abs().max() > 0]
    assert len(reached) == len(adapters)
    model.eval()
    assert not torch.equal(forward(model), expected)
    unload()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert torch.equal(forward(model), expected)


def _add_adapter(model: Any) -> Callable[[], Any]:
    """Adds a LoRA; returns what takes it off again."""
    config = LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    if hasattr(model, "add_adapter"):
        model.add_adapter(config)
        unload: Callable[[], Any] = model.unload_lora
        return unload
    wrapped = get_peft_model(model, config)  # diffusers' DiT and PixArt know no adapters
    return lambda: wrapped.unload()


def _loss(model: nn.Module) -> torch.Tensor:
    inputs = family_of(model).sample_inputs(model, 1, torch.Generator().manual_seed(0))
    return run(model, inputs).float().square().mean()
