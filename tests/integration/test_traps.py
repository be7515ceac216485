"""One test for each trap of diffusers' loader; the numbers are those of the research notes.

Most of these failed silently for one quantizer or another: the model loads, runs and is wrong.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoModel,
    ControlNetModel,
    DiffusionPipeline,
    PipelineQuantizationConfig,
    StableDiffusionImg2ImgPipeline,
    UNet2DConditionModel,
)
from diffusers.hooks import apply_group_offloading
from diffusers.models import modeling_utils
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from dq import DQConfig, DQError, DQPipeline
from dq.nn import PackedConv2d, PackedLinear, norm, packed_layers
from dq.nn.joined import JOINED
from dq.nn.stored import COMPANIONS
from tests.models import MODELS
from tests.models.parts import finish
from tests.packed import forward, relative_error, same_state

Folders = Callable[[str], Path]
PackedFolders = Callable[[str, str], Path]

W8, W4 = "w8a8-dynamic", "w4a16"


@pytest.fixture
def sd32(model_folders: Folders) -> Path:
    return model_folders("sd32")


@pytest.fixture
def packed32(packed_folders: PackedFolders) -> Path:
    return packed_folders("sd32", W8)


def unet(folder: Path, **kwargs: Any) -> Any:
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet", **kwargs)


def scales(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns the tensors that no cast may touch."""
    kept = (*COMPANIONS, "weight")
    return {
        f"{name}.{leaf}": tensor.clone()
        for name, layer in packed_layers(model).items()
        for leaf, tensor in layer.state_dict().items()
        if leaf in kept
    }


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


def test_1_no_dtype_keeps_the_weights(sd32: Path, packed32: Path) -> None:
    """Without a dtype the loader casts float weights to the placeholder's, integers to zero."""
    expected = forward(unet(sd32))
    for model in (unet(sd32, quantization_config=DQConfig(W8)), unet(packed32)):
        assert model.dtype == torch.float32
        assert relative_error(forward(model), expected) < 0.08


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_2_float_scales_do_not_pass_through_the_dtype(packed32: Path, dtype: torch.dtype) -> None:
    """Floating tensors of a file are cast to the dtype of the model: scales lost 0.4 %."""
    full, half = unet(packed32), unet(packed32, torch_dtype=dtype)
    assert half.dtype == half.conv_in.bias.dtype == dtype
    assert equal(scales(full), scales(half))


def test_3_bfloat16_keeps_scales(packed32: Path) -> None:
    """`.bfloat16()` is not guarded by diffusers, and cast the scales."""
    model = unet(packed32)
    before = scales(model)
    model.bfloat16()
    assert equal(scales(model), before)
    assert model.dtype == torch.bfloat16
    assert {layer.compute_dtype for layer in packed_layers(model).values()} == {torch.bfloat16}
    assert torch.equal(forward(model), forward(unet(packed32, torch_dtype=torch.bfloat16)))


def test_3_layerwise_casting_keeps_scales(sd32: Path, packed32: Path) -> None:
    """Layerwise casting to float8 takes any `nn.Linear`, and cast scales: an error of 0.30."""
    storage = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    plain, model = unet(sd32), unet(packed32)
    reference, before = forward(plain), scales(model)
    plain.enable_layerwise_casting(**storage)
    model.enable_layerwise_casting(**storage)
    assert relative_error(forward(model), reference) < 1.2 * relative_error(
        forward(plain), reference
    )
    assert equal(scales(model), before)


def test_5_dequantize_forgets_the_config(packed32: Path, tmp_path: Path) -> None:
    """The key stayed in the config: the float checkpoint claimed to be quantized."""
    model = unet(packed32)
    model.dequantize()
    assert "quantization_config" not in model.config
    model.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "unet")
    again = unet(tmp_path, torch_dtype=torch.bfloat16)
    assert not packed_layers(again)
    assert same_state(again, model)
    assert packed_layers(unet(tmp_path, quantization_config=DQConfig(W8)))  # and once more


def test_6_no_key_is_skipped_on_the_fly(sd32: Path) -> None:
    """The loader skips keys that a placeholder has not got: weights stayed random."""
    model, info = unet(sd32, quantization_config=DQConfig(W4), output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    original = unet(sd32)
    for name, layer in packed_layers(model).items():
        weight = original.get_submodule(name).weight
        assert relative_error(layer.float_weight(), weight) < 0.2, name


def test_7_single_file_on_the_fly(sd32: Path, packed32: Path) -> None:
    """`from_single_file` claims of every file that it is quantized already."""
    file = str(sd32 / "unet/diffusion_pytorch_model.safetensors")
    config = {"config": str(sd32), "subfolder": "unet"}
    model = UNet2DConditionModel.from_single_file(file, quantization_config=DQConfig(W8), **config)
    assert same_state(model, unet(packed32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_7_single_file_packed(sd32: Path, packed32: Path, dtype: torch.dtype) -> None:
    """With unknown keys in a file diffusers takes it for an LDM checkpoint."""
    values = json.loads((packed32 / "unet/config.json").read_text())["quantization_config"]
    model = UNet2DConditionModel.from_single_file(
        str(packed32 / "unet/diffusion_pytorch_model.safetensors"),
        quantization_config=DQConfig.from_dict(values),
        config=str(sd32),
        subfolder="unet",
        torch_dtype=dtype,
    )
    assert same_state(model, unet(packed32, torch_dtype=dtype))
    assert torch.equal(forward(model), forward(unet(packed32, torch_dtype=dtype)))


def test_8_a_refused_cast_casts_nothing(packed32: Path) -> None:
    """`pipe.to(dtype)` cast VAE and text encoder before the denoiser refused."""
    pipe = DQPipeline.from_pretrained(packed32)
    for arguments in ({"torch_dtype": torch.bfloat16}, {"dtype": torch.bfloat16}):
        with pytest.raises(DQError, match="unet is packed and cannot be cast"):
            pipe.to(**arguments)
    with pytest.raises(DQError, match="nothing was cast"):
        pipe.to("cpu", torch.bfloat16)
    dtypes = {m.dtype for m in (pipe.vae, pipe.text_encoder, pipe.unet)}
    assert dtypes == {torch.float32}
    assert pipe.to("cpu") is pipe


def test_10_quantizes_by_backend(sd32: Path, packed32: Path) -> None:
    """The backend must stand in transformers' mapping too, with the same constructor."""
    config = PipelineQuantizationConfig(
        quant_backend="dq", quant_kwargs={"recipe": W8}, components_to_quantize=["unet"]
    )
    pipe = DiffusionPipeline.from_pretrained(sd32, quantization_config=config)
    assert same_state(pipe.unet, unet(packed32))


def test_10_quantizes_by_mapping(sd32: Path, packed32: Path) -> None:
    config = PipelineQuantizationConfig(quant_mapping={"unet": DQConfig(W8)})
    pipe = DiffusionPipeline.from_pretrained(sd32, quantization_config=config)
    assert same_state(pipe.unet, unet(packed32))
    assert not any(isinstance(m, (PackedLinear, PackedConv2d)) for m in pipe.vae.modules())


def test_11_low_cpu_mem_usage_is_needed(packed32: Path) -> None:
    with pytest.raises(ValueError, match="low_cpu_mem_usage"):
        unet(packed32, low_cpu_mem_usage=False)


def test_11_disk_is_refused(sd32: Path, packed32: Path, tmp_path: Path) -> None:
    """Tensors bound for the disk are written before they are quantized."""
    for folder, config in ((sd32, DQConfig(W8)), (packed32, None)):
        for device_map in ({"": "disk"}, {"conv_in": "cpu", "": "disk"}):
            with pytest.raises(DQError, match="group offloading"):
                unet(
                    folder,
                    quantization_config=config,
                    device_map=device_map,
                    offload_folder=str(tmp_path),
                )


def test_11_and_12_device_map_on_the_fly(sd32: Path, packed32: Path) -> None:
    model = unet(sd32, quantization_config=DQConfig(W8), device_map={"": "cpu"})
    assert same_state(model, unet(packed32))


def test_13_from_pipe_is_diffusers_to_mend(packed32: Path) -> None:
    """It always casts, and raises for any quantized component; components can be shared by hand."""
    pipe = DQPipeline.from_pretrained(packed32)
    with pytest.raises(ValueError, match="Casting a quantized model"):
        StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    shared = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    assert shared.unet is pipe.unet
    finish(shared)
    image = torch.rand(1, 3, 32, 32)
    arguments = {"image": image, "strength": 1.0, "num_inference_steps": 2, "output_type": "np"}
    assert np.isfinite(shared("a fox", **arguments).images).all()


def ip_adapter(model: Any, width: int = 16) -> dict[str, dict[str, torch.Tensor]]:
    """Returns an IP-Adapter for a UNet, in the layout of the published files."""
    cross = model.config.cross_attention_dim
    layers = {}
    for number, (name, processor) in enumerate(model.attn_processors.items()):
        if name.endswith("attn2.processor"):
            channels = model.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for part in ("to_k_ip", "to_v_ip"):
                layers[f"{number}.{part}.weight"] = torch.randn(channels, cross) / 8
        del processor
    projection = {
        "proj.weight": torch.randn(4 * cross, width) / 4,
        "proj.bias": torch.zeros(4 * cross),
        "norm.weight": torch.ones(cross),
        "norm.bias": torch.zeros(cross),
    }
    return {"image_proj": projection, "ip_adapter": layers}


def test_14_ip_adapter_before_quantization(sd32: Path, packed32: Path) -> None:
    """Its loader casts the model, and the projection casts images to the dtype of its weight."""
    packed = DQPipeline.from_pretrained(packed32)
    with pytest.raises(ValueError, match="Casting a quantized model"):
        packed.load_ip_adapter(
            ip_adapter(packed.unet), subfolder="", weight_name="", image_encoder_folder=None
        )
    pipe = finish(DQPipeline.from_pretrained(sd32))
    adapter = ip_adapter(pipe.unet)
    pipe.load_ip_adapter(adapter, subfolder="", weight_name="", image_encoder_folder=None)
    embeds = torch.randn(2, 1, 16)

    def draw(scale: float) -> np.ndarray:
        pipe.set_ip_adapter_scale(scale)
        call = MODELS["sd32"].call
        return call(pipe, ip_adapter_image_embeds=[embeds], output_type="latent")

    expected = draw(1.0)
    pipe.quantize(W8)
    # The adapter itself stays float: it is not in the denoiser's checkpoint.
    assert packed_layers(pipe.unet).keys() == packed_layers(packed.unet).keys()
    image = draw(1.0)
    assert np.corrcoef(image.ravel(), expected.ravel())[0, 1] > 0.8
    assert np.linalg.norm(image - draw(0.0)) > 0.1 * np.linalg.norm(expected)


@pytest.fixture
def lora(sd32: Path, tmp_path: Path) -> Path:
    """A LoRA of linears and convolutions, made on the float model."""
    pipe = DiffusionPipeline.from_pretrained(sd32)
    config = LoraConfig(r=4, target_modules=["to_q", "to_v", "ff.net.0.proj", "conv1"])
    pipe.unet.add_adapter(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    from peft.utils import get_peft_model_state_dict

    layers = get_peft_model_state_dict(pipe.unet)
    type(pipe).save_lora_weights(tmp_path / "lora", unet_lora_layers=layers)
    return tmp_path / "lora"


@pytest.mark.parametrize("recipe", [W8, "w4a8-static", W4])
def test_15_lora_on_packed_layers(
    sd32: Path, recipe: str, packed_folders: PackedFolders, lora: Path
) -> None:
    """PEFT takes our layers for the torch layers that they are; nothing is left after unloading."""
    plain = finish(DiffusionPipeline.from_pretrained(sd32))
    pipe = finish(DQPipeline.from_pretrained(packed_folders("sd32", recipe)))
    float_without, without = forward(plain.unet), forward(pipe.unet)
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    plain.load_lora_weights(lora)
    pipe.load_lora_weights(lora)
    effect, packed_effect = forward(plain.unet) - float_without, forward(pipe.unet) - without
    assert effect.norm() > 0.05 * float_without.norm()
    assert (packed_effect - effect).norm() < 0.5 * effect.norm()
    pipe.set_adapters("default_0", adapter_weights=0.0)
    assert torch.equal(forward(pipe.unet), without)
    pipe.unload_lora_weights()
    after = pipe.unet.state_dict()
    assert equal(before, dict(after))
    assert torch.equal(forward(pipe.unet), without)


def test_15_fusing_is_refused(packed32: Path, lora: Path) -> None:
    """Adding to codes would be wrong, adding to a temporary would be lost."""
    pipe = DQPipeline.from_pretrained(packed32)
    expected = forward(pipe.unet)
    pipe.load_lora_weights(lora)
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    with pytest.raises((DQError, RuntimeError, ValueError)):
        pipe.fuse_lora()
    assert equal(before, dict(pipe.unet.state_dict()))
    pipe.unload_lora_weights()
    assert torch.equal(forward(pipe.unet), expected)


def test_15_adapters_are_not_saved_or_packed(
    sd32: Path, packed32: Path, lora: Path, tmp_path: Path
) -> None:
    """PEFT renames what it wraps: a checkpoint of such names cannot be loaded."""
    pipe = DQPipeline.from_pretrained(packed32)
    pipe.load_lora_weights(lora)
    with pytest.raises(DQError, match="unload_lora_weights"):
        pipe.save_pretrained(tmp_path / "saved")
    pipe = DQPipeline.from_pretrained(sd32)
    pipe.load_lora_weights(lora)
    with pytest.raises(DQError, match="unload_lora_weights"):
        pipe.quantize(W8)
    # Fused first, the adapter is a part of the weights.
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused = forward(pipe.unet)
    pipe.quantize(W8)
    assert relative_error(forward(pipe.unet), fused) < 0.08


def test_16_copies_of_codes_are_refused(packed32: Path) -> None:
    """Fused projections and ControlNets copy weights; codes must not pass for them."""
    model = unet(packed32)
    with pytest.raises((RuntimeError, ValueError)):
        model.fuse_qkv_projections()
    with pytest.raises((RuntimeError, ValueError)):
        ControlNetModel.from_unet(unet(packed32))


def test_17_layers_tell_their_compute_dtype(packed32: Path) -> None:
    """Models cast activations to the dtype of a weight, and ask packed layers for another."""
    for dtype in (torch.float32, torch.bfloat16):
        layers = packed_layers(unet(packed32, torch_dtype=dtype))
        assert {layer.compute_dtype for layer in layers.values()} == {dtype}


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_18_both_names_of_the_dtype(sd32: Path, argument: str) -> None:
    pipe = DQPipeline.from_pretrained(sd32, W8, **{argument: torch.bfloat16})
    assert pipe.unet.dtype == pipe.vae.dtype == torch.bfloat16


def test_variant(packed32: Path, tmp_path: Path) -> None:
    pipe = DQPipeline.from_pretrained(packed32)
    pipe.save_pretrained(tmp_path, variant="int8")
    assert (tmp_path / "unet/diffusion_pytorch_model.int8.safetensors").is_file()
    assert same_state(DQPipeline.from_pretrained(tmp_path, variant="int8").unet, pipe.unet)
    again = DQPipeline.from_pretrained(sd32_variant(tmp_path), W4, variant="fp32")
    assert packed_layers(again.unet)


def sd32_variant(folder: Path) -> Path:
    target = folder / "float"
    MODELS["sd32"].build().save_pretrained(target, variant="fp32")
    return target


def test_pickled_weights(packed32: Path, tmp_path: Path) -> None:
    model = unet(packed32)
    model.save_pretrained(tmp_path / "unet", safe_serialization=False)
    assert same_state(unet(tmp_path, use_safetensors=False), model)


def test_files_without_our_header(packed32: Path, tmp_path: Path) -> None:
    """Tools that rewrite safetensors files drop the metadata; the digest in the config remains."""
    model = unet(packed32)
    model.save_pretrained(tmp_path / "unet")
    file = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file(tensors, file, metadata={"format": "pt"})
    assert same_state(unet(tmp_path), model)
    tensors[JOINED] = tensors[JOINED] * 2
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(DQError, match="different checkpoints"):
        unet(tmp_path)


def test_parallel_loading(
    sd32: Path, packed32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = unet(packed32), unet(sd32)
    model.save_pretrained(tmp_path / "packed/unet", max_shard_size="200KB")
    plain.save_pretrained(tmp_path / "float/unet", max_shard_size="800KB")
    assert len(list((tmp_path / "packed/unet").glob("*.safetensors"))) > 3
    monkeypatch.setattr(modeling_utils, "HF_ENABLE_PARALLEL_LOADING", True)
    assert same_state(unet(tmp_path / "packed"), model)
    assert same_state(unet(tmp_path / "float", quantization_config=DQConfig(W8)), model)


def test_auto_model(packed32: Path) -> None:
    model = AutoModel.from_pretrained(str(packed32), subfolder="unet")
    assert type(model) is UNet2DConditionModel
    assert same_state(model, unet(packed32))


def test_deepcopy(packed32: Path) -> None:
    model = unet(packed32)
    expected = forward(model)  # kernels have made their copies now
    twin = copy.deepcopy(model)
    assert same_state(twin, model)
    with torch.no_grad():
        model.conv_out.weight_scale.mul_(2)
    assert torch.equal(forward(twin), expected)
    assert not torch.equal(forward(model), expected)


def test_overwritten_codes_are_noticed(packed32: Path, packed_folders: PackedFolders) -> None:
    """Kernels keep copies of the codes; loading other ones in place must not run the old."""
    model = unet(packed32)
    before = forward(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in packed_layers(twin).values():
            layer.weight_scale.mul_(1.5)
            layer.weight.copy_(layer.weight.flip(0))
    expected = forward(twin)
    model.load_state_dict(twin.state_dict())
    assert torch.equal(forward(model), expected)
    assert not torch.equal(expected, before)


@pytest.mark.parametrize("recipe", [W8, "w4a8-static"])
@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offloading(recipe: str, kind: str, packed_folders: PackedFolders) -> None:
    model = unet(packed_folders("sd32", recipe))
    expected = forward(model)
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    apply_group_offloading(
        model,
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type=kind,
        **blocks,
    )
    assert torch.equal(forward(model), expected)
    assert torch.equal(forward(model), expected)


def test_group_offloading_to_disk(packed32: Path, tmp_path: Path) -> None:
    model = unet(packed32)
    expected = forward(model)
    model.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_type="leaf_level",
        offload_to_disk_path=str(tmp_path),
    )
    assert torch.equal(forward(model), expected)
    assert torch.equal(forward(model), expected)


@pytest.mark.parametrize("roles", [("time",), ("io", "time", "modulation", "caption")])
@pytest.mark.parametrize("name", ["sd32", "sdxl", "dit64", "pixart64", "sd3", "flux"])
def test_float_layers_reload_to_the_same_bits(
    name: str, roles: tuple[str, ...], model_folders: Folders, tmp_path: Path
) -> None:
    """safetensors maps weights at odd offsets, where MKL adds products up in another order."""
    case = MODELS[name]
    for inputs in ("dynamic", "static"):
        step = {"method": "ptq", "weights": "int8", "inputs": "int8", "dynamic": inputs}
        calibration = {"n": 1, "steps": 1, "batch": 1}
        recipe = {"name": "skips", "steps": [{**step, "skip_roles": list(roles)}]}
        pipe = finish(
            DQPipeline.from_pretrained(model_folders(name), {**recipe, "calibration": calibration})
        )
        pipe.save_pretrained(tmp_path / inputs)
        again = finish(DiffusionPipeline.from_pretrained(tmp_path / inputs))
        assert torch.equal(forward(case.network(again)), forward(case.network(pipe)))
        assert np.array_equal(case.call(again), case.call(pipe))


def test_compiles_a_block_without_a_graph_break(packed_folders: PackedFolders) -> None:
    model = DiffusionPipeline.from_pretrained(packed_folders("dit64", W8)).transformer
    expected = forward(model)
    torch._dynamo.reset()
    model.transformer_blocks[1].compile(fullgraph=True)
    first = forward(model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        second = forward(model)
    assert relative_error(first, expected) < 1e-3
    assert torch.equal(first, second)


@pytest.mark.slow
def test_compiles_a_whole_unet(packed32: Path) -> None:
    model = unet(packed32)
    # Graphs have no native norms, whose last bits differ: on some processors one code of the middle
    # block falls on its other side, and others after it.
    norm.uninstall(model)
    expected = forward(model)
    norm.install(model)
    torch._dynamo.reset()
    model.compile(fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            assert relative_error(forward(model), expected) < 1e-3
