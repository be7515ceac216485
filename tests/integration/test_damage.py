"""Damaged and mixed-up checkpoints: each is a `DQError` that says what, where, and the remedy."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dq import DQError, DQPipeline
from dq.nn.joined import JOINED
from tests.packed import same_state

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
REMEDY = "copy or download|pip install"

Folders = Callable[[str, str], Path]


@pytest.fixture
def folder(packed_folders: Folders, tmp_path: Path) -> Path:
    """A copy of a W4A8 pipeline with static inputs, free to be damaged."""
    return Path(shutil.copytree(packed_folders("sd32", "w4a8-static"), tmp_path / "damaged"))


@pytest.fixture
def other(packed_folders: Folders) -> Path:
    """The same model by another recipe."""
    return packed_folders("sd32", "w4a16")


def refused(folder: Path, *words: str, plainly: bool = True) -> str:
    """Checks that every way to load says what is wrong; returns what DQPipeline says.

    Args:
        folder: The damaged pipeline.
        words: What the message has to name.
        plainly: Whether our hooks are reached when diffusers loads without DQPipeline.
    """
    loaders: list[Callable[[], Any]] = [lambda: DQPipeline.from_pretrained(folder)]
    if plainly:
        loaders += [
            lambda: DiffusionPipeline.from_pretrained(folder),
            lambda: UNet2DConditionModel.from_pretrained(folder, subfolder="unet"),
        ]
    for load in loaders:
        with pytest.raises(DQError, match=REMEDY) as raised:
            load()
        for word in words:
            assert word in str(raised.value)
    return str(raised.value)


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrites the weights with an honest header of their old checksums."""
    file = folder / WEIGHTS
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata=metadata)


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "unet/config.json"
    config = json.loads(file.read_text())
    edit(config["quantization_config"])
    file.write_text(json.dumps(config))


def flip(file: Path, position: int, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)


def data_start(file: Path) -> int:
    return 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.9999])
def test_truncated(folder: Path, share: float) -> None:
    file = folder / WEIGHTS
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    # diffusers opens the file before our hooks are reached, and takes it for a missing one.
    refused(folder, str(file), plainly=False)
    with pytest.raises(OSError, match="Unable to load weights"):
        DiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize("component", ["vae", "text_encoder"])
def test_truncated_elsewhere(folder: Path, component: str) -> None:
    file = next((folder / component).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, str(file), plainly=False)


def test_truncated_shard(folder: Path) -> None:
    UNet2DConditionModel.from_pretrained(folder, subfolder="unet").save_pretrained(
        folder / "unet", max_shard_size="200KB"
    )
    (folder / WEIGHTS).unlink()
    file = sorted((folder / "unet").glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-1])
    refused(folder, str(file))


def test_truncated_float_checkpoint(model_folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folders("sd32"), tmp_path / "float"))
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DQError, match=REMEDY) as raised:
        DQPipeline.from_pretrained(folder, "w8a8-dynamic")
    assert str(file) in str(raised.value)


@pytest.mark.parametrize(
    "name",
    [
        "mid_block.resnets.0.conv1.weight",
        JOINED,
        "mid_block.resnets.0.conv1.bias",
        "mid_block.resnets.0.norm1.weight",
    ],
)
def test_one_flipped_bit_is_named(folder: Path, name: str) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1).view(torch.uint8)[-1] ^= 1

    edit_tensors(folder, edit)
    refused(folder, f"tensor {name} is damaged")


def test_no_flipped_bit_goes_unnoticed(packed_folders: Folders, tmp_path: Path) -> None:
    """Anywhere in the file: refused, or (in the padding of the header) without any effect."""
    folder = Path(shutil.copytree(packed_folders("pixart64", "w4a8-static"), tmp_path / "bits"))
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    size, start = file.stat().st_size, data_start(file)
    whole = DQPipeline.from_pretrained(folder).transformer
    generator = torch.Generator().manual_seed(0)

    def drawn(low: int, high: int, n: int) -> list[int]:
        return torch.randint(low, high, (n,), generator=generator).tolist()

    positions = [*drawn(start, size, 30), *drawn(0, start, 30), 0, 7, 8, start - 1, start, size - 1]
    noticed = 0
    for position, bit in zip(positions, drawn(0, 8, len(positions)), strict=True):
        flip(file, position, bit)
        try:
            loaded = type(whole).from_pretrained(folder, subfolder="transformer")
        except (DQError, OSError) as error:
            noticed += 1
            if position >= start:
                assert isinstance(error, DQError)
            else:
                with pytest.raises(DQError, match=REMEDY):
                    DQPipeline.from_pretrained(folder)
        else:
            assert position < start
            assert same_state(loaded, whole), f"bit {bit} of byte {position}"
        flip(file, position, bit)
    assert noticed > len(positions) - 10
    assert same_state(DQPipeline.from_pretrained(folder).transformer, whole)


def test_weights_of_another_recipe(folder: Path, other: Path) -> None:
    shutil.copy(other / WEIGHTS, folder / WEIGHTS)
    refused(folder, f"tensor {JOINED} should be float32", "different checkpoints")


def test_weights_of_another_training(
    folder: Path, packed_folders: Folders, model_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """The same model, recipe and shapes: only the digest tells."""
    pipe = DiffusionPipeline.from_pretrained(model_folders("sd32"))
    with torch.no_grad():
        pipe.unet.conv_in.weight += 0.1
    pipe.save_pretrained(tmp_path / "trained")
    DQPipeline.from_pretrained(tmp_path / "trained", "w4a16").save_pretrained(tmp_path / "other")
    copied = Path(shutil.copytree(packed_folders("sd32", "w4a16"), tmp_path / "mixed"))
    shutil.copy(tmp_path / "other" / WEIGHTS, copied / WEIGHTS)
    refused(copied, "checksum", "different checkpoints")


def test_weights_of_another_model(folder: Path, packed_folders: Folders) -> None:
    shutil.copy(packed_folders("sd64", "w4a8-static") / WEIGHTS, folder / WEIGHTS)
    refused(folder, "tensor", "should be", "different checkpoints")


def test_float_weights_under_a_plan(folder: Path, model_folders: Callable[[str], Path]) -> None:
    shutil.copy(model_folders("sd32") / WEIGHTS, folder / WEIGHTS)
    refused(folder, f"the first is {JOINED}", "different checkpoints")


def test_config_of_another_recipe(folder: Path, other: Path) -> None:
    shutil.copy(other / "unet/config.json", folder / "unet/config.json")
    refused(folder, f"tensor {JOINED} should be float32", "different checkpoints")


def test_config_that_differs_in_inputs_only(packed_folders: Folders, tmp_path: Path) -> None:
    """W8A16 and W8A8-dynamic store the same tensors."""
    folder = Path(shutil.copytree(packed_folders("sd32", "w8a8-dynamic"), tmp_path / "inputs"))

    def edit(config: dict[str, Any]) -> None:
        for spec in config["plan"]["specs"]:
            del spec["input"]

    edit_config(folder, edit)
    refused(folder, "checksum", "different checkpoints")


def test_config_that_packs_less(folder: Path) -> None:
    edit_config(folder, lambda config: config["plan"]["layers"].pop("conv_in"))
    refused(folder, f"tensor {JOINED} should be float32", "different checkpoints")


def test_config_that_packs_more(packed_folders: Folders, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed_folders("dit64", "w4a16"), tmp_path / "more"))
    file = folder / "transformer/config.json"
    config = json.loads(file.read_text())
    layers = config["quantization_config"]["plan"]["layers"]
    layers["transformer_blocks.0.attn1.to_k.nonsense"] = 0
    file.write_text(json.dumps(config))
    with pytest.raises(DQError, match=r"Did you mean 'transformer_blocks\.0\.attn1\.to_k'"):
        DQPipeline.from_pretrained(folder)


def test_plan_of_another_class(folder: Path, packed_folders: Folders) -> None:
    values = json.loads((packed_folders("dit64", "w4a16") / "transformer/config.json").read_text())
    plan = values["quantization_config"]["plan"]
    edit_config(folder, lambda config: config.update(plan=plan))
    with pytest.raises(DQError, match="made for DiTTransformer2DModel, not for UNet2DCond"):
        DQPipeline.from_pretrained(folder)


def test_codes_of_wrong_size(folder: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :-1].clone()

    edit_tensors(folder, edit)
    refused(folder, "tensor conv_in.weight should be uint8 (32, 36, 1, 1)", "(32, 35, 1, 1)")


def test_codes_of_wrong_dtype(folder: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["conv_in.weight"] = tensors["conv_in.weight"].float()

    edit_tensors(folder, edit)
    refused(folder, "tensor conv_in.weight should be uint8", "float32")


def test_numbers_of_another_layer(folder: Path) -> None:
    """All that is beside the codes is one tensor: without a header the digest tells an exchange."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[JOINED] = tensors[JOINED].roll(1)

    edit_tensors(folder, edit)
    refused(folder, f"tensor {JOINED} is damaged")
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"format": "pt"})
    refused(folder, "checksum", "different checkpoints")


@pytest.mark.parametrize("name", ["conv_in.weight", JOINED, "conv_in.bias"])
def test_missing_tensor(folder: Path, name: str) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    refused(folder)
    # Neither the header nor the digest is needed to notice.
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    edit_config(folder, lambda config: config.pop("digest"))
    refused(folder, f"the first is {name}")


def test_missing_float_tensor_on_the_fly(
    model_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model_folders("sd32"), tmp_path / "float"))
    edit_tensors(folder, lambda tensors: tensors.pop("mid_block.resnets.0.conv1.weight"))
    with pytest.raises(DQError, match=r"mid_block\.resnets\.0\.conv1\.weight.*download it again"):
        DQPipeline.from_pretrained(folder, "w8a8-dynamic")


def test_future_version(folder: Path) -> None:
    edit_config(folder, lambda config: config.update(version=99))
    refused(folder, "plan version 99", "pip install -U dq-diffusion")


def test_unknown_keys(folder: Path) -> None:
    edit_config(folder, lambda config: config.update(plann=config.pop("plan")))
    with pytest.raises(DQError, match="Did you mean 'plan'"):
        DQPipeline.from_pretrained(folder)


def test_unknown_key_of_a_plan(folder: Path) -> None:
    edit_config(folder, lambda config: config["plan"].update(layer={}))
    with pytest.raises(DQError, match="Did you mean 'layers'"):
        DQPipeline.from_pretrained(folder)


def test_unknown_key_of_a_spec(folder: Path) -> None:
    edit_config(folder, lambda config: config["plan"]["specs"][0]["weight"].update(formt="int4"))
    with pytest.raises(DQError, match=r"specs\[0\].*Did you mean 'format'"):
        DQPipeline.from_pretrained(folder)


@pytest.mark.parametrize("value", [None, 5, "text", [], {}, [[]], False])
@pytest.mark.parametrize("key", ["plan", "version", "specs", "layers", "model"])
def test_values_of_wrong_kind(folder: Path, key: str, value: object) -> None:
    def edit(config: dict[str, Any]) -> None:
        place = config if key in ("plan", "version") else config["plan"]
        place[key] = value

    edit_config(folder, edit)
    with pytest.raises(DQError):
        UNet2DConditionModel.from_pretrained(folder, subfolder="unet")


def test_recipe_file(folder: Path) -> None:
    (folder / "dq_recipe.json").write_text("{")
    with pytest.raises(DQError, match=r"dq_recipe\.json.*not valid JSON"):
        DQPipeline.from_pretrained(folder)
