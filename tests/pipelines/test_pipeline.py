"""DQPipeline as a user meets it: load, quantize, save, load elsewhere, resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel

from dq import DQConfig, DQError, DQPipeline, Recipe
from dq.nn import packed_layers
from tests.models import MODELS
from tests.models.parts import finish, seeded
from tests.packed import CASES, RECIPES, same_state, static

Folders = Callable[[str], Path]
PackedFolders = Callable[[str, str], Path]


def run(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in a fresh process, outside of the checkout."""
    return subprocess.run(
        [sys.executable, "-P", "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd="/",
        env={**os.environ, **environment},
        check=False,
    )


_DRAW = """
import json, sys
import numpy, torch
torch.set_num_threads(1)
import dq  # registers the method: nothing else of dq is used
from diffusers import DiffusionPipeline
for folder, dtype, arguments, target in json.loads(sys.argv[1]):
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, dtype))
    generator = torch.Generator().manual_seed(0)
    numpy.save(target, pipe(**arguments, generator=generator).images)
"""


def test_plain_diffusers_draws_the_same_images_in_a_fresh_process(
    packed_folders: PackedFolders, model_folders: Folders, tmp_path: Path
) -> None:
    jobs, expected = [], {}
    for name, recipe in (
        ("sd32", "w8a8-dynamic"),
        ("sdxl", "w4a16"),
        ("dit64", "w4a8-static"),
        ("flux", "w4a8-static"),
    ):
        for dtype in ("float32", "bfloat16"):
            folder = packed_folders(name, recipe)
            pipe = finish(DQPipeline.from_pretrained(folder, dtype=getattr(torch, dtype)))
            target = tmp_path / f"{name}-{recipe}-{dtype}.npy"
            expected[target] = CASES[name].call(pipe)
            jobs.append([str(folder), dtype, dict(CASES[name].arguments), str(target)])
    done = run(_DRAW, json.dumps(jobs))
    assert done.returncode == 0, done.stderr
    for target, image in expected.items():
        assert np.isfinite(image).all()
        assert np.array_equal(np.load(target), image), target.stem


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", CASES)
def test_saved_pipelines_draw_what_live_ones_drew(
    name: str, recipe: str, dtype: torch.dtype, model_folders: Folders, tmp_path: Path
) -> None:
    """Not only reloaded against reloaded: against the model that was quantized in this process."""
    case = CASES[name]
    live = finish(DQPipeline.from_pretrained(model_folders(name), RECIPES[recipe], dtype=dtype))
    live.save_pretrained(tmp_path)
    again = finish(DQPipeline.from_pretrained(tmp_path, dtype=dtype))
    assert same_state(case.network(again), case.network(live))
    assert np.array_equal(case.call(again), case.call(live))


def test_without_dq_the_method_is_unknown(packed_folders: PackedFolders) -> None:
    script = (
        "import sys; from diffusers import DiffusionPipeline;"
        "DiffusionPipeline.from_pretrained(sys.argv[1])"
    )
    done = run(script, packed_folders("dit64", "w4a16"))
    assert done.returncode != 0
    assert "Unknown quantization type, got dq" in done.stderr


@pytest.mark.parametrize("name", CASES)
def test_is_both_classes(
    name: str, model_folders: Folders, packed_folders: PackedFolders, tmp_path: Path
) -> None:
    plain = type(CASES[name].build())
    pipe = DQPipeline.from_pretrained(packed_folders(name, "w4a16"))
    assert isinstance(pipe, DQPipeline)
    assert isinstance(pipe, plain)
    assert type(pipe).__name__ == plain.__name__
    original = json.loads((model_folders(name) / "model_index.json").read_text())
    saved = json.loads((packed_folders(name, "w4a16") / "model_index.json").read_text())
    assert {k: v for k, v in saved.items() if k != "_name_or_path"} == {
        k: v for k, v in original.items() if k != "_name_or_path"
    }
    # Nothing is left to dq: plain diffusers loads the plain class.
    assert type(DiffusionPipeline.from_pretrained(packed_folders(name, "w4a16"))) is plain


def test_loads_float_pipelines(model_folders: Folders) -> None:
    pipe = finish(DQPipeline.from_pretrained(model_folders("sd32")))
    assert pipe.plan is None
    assert pipe.recipe is None
    assert "0 layers packed" in pipe.summary()
    plain = finish(DiffusionPipeline.from_pretrained(model_folders("sd32")))
    assert np.array_equal(MODELS["sd32"].call(pipe), MODELS["sd32"].call(plain))


def test_quantizes_in_place_and_on_the_fly_alike(model_folders: Folders) -> None:
    for name in ("sd32", "dit64", "sd3"):
        on_the_fly = DQPipeline.from_pretrained(model_folders(name), "w4a8-dynamic")
        in_place = DQPipeline.from_pretrained(model_folders(name))
        plan = in_place.quantize("w4a8-dynamic")
        assert plan == in_place.plan == on_the_fly.plan
        assert same_state(in_place.denoiser, on_the_fly.denoiser)


def test_what_was_saved_in_another_dtype_draws_without_naming_one(tmp_path: Path) -> None:
    # Text encoders would be loaded as they are stored, and the rest in float32.
    pipe = DQPipeline.from_pretrained("emoji-unet", "w4a8-dynamic", dtype=torch.bfloat16)
    pipe.save_pretrained(tmp_path)
    for named, expected in (({}, torch.float32), ({"dtype": torch.bfloat16}, torch.bfloat16)):
        again = DQPipeline.from_pretrained(tmp_path, **named)
        models = (again.text_encoder, again.unet, again.vae)
        assert [model.dtype for model in models] == [expected] * 3
        assert again("apple", num_inference_steps=2, output_type="latent").images.isfinite().all()


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
def test_components_may_have_dtypes_of_their_own(default: torch.dtype) -> None:
    asked = {"unet": torch.float16, "default": default}
    pipe = DQPipeline.from_pretrained("emoji-unet", "w4a8-dynamic", dtype=asked)
    models = (pipe.unet, pipe.vae, pipe.text_encoder)
    assert [model.dtype for model in models] == [torch.float16, default, default]


def test_what_the_caller_brings_is_quantized(model_folders: Folders) -> None:
    mine = UNet2DConditionModel.from_pretrained(model_folders("sd32"), subfolder="unet")
    with torch.no_grad():
        mine.conv_out.bias += 1
    pipe = DQPipeline.from_pretrained(model_folders("sd32"), "w8a8-dynamic", unet=mine)
    assert pipe.unet is mine
    assert packed_layers(mine)


def test_model_offloading(packed_folders: PackedFolders) -> None:
    pipe = finish(DQPipeline.from_pretrained(packed_folders("sd32", "w8a8-dynamic")))
    expected = MODELS["sd32"].call(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert np.array_equal(MODELS["sd32"].call(pipe), expected)


def test_device_map(model_folders: Folders, packed_folders: PackedFolders) -> None:
    mapped = DQPipeline.from_pretrained(model_folders("sd32"), "w8a8-dynamic", device_map="cpu")
    plain = DQPipeline.from_pretrained(packed_folders("sd32", "w8a8-dynamic"), device_map="cpu")
    assert same_state(mapped.unet, plain.unet)


def test_summary_and_footprint(packed_folders: PackedFolders) -> None:
    pipe = DQPipeline.from_pretrained(packed_folders("sd64", "w4a8-static"))
    count = pipe.footprint()
    assert count.parameters == 3_918_532
    assert 4 < count.average_weight_bits < 5
    assert count.float_bytes > 6 * count.stored_bytes
    text = pipe.summary()
    assert "3.9 M parameters" in text
    assert all(path in text for path in count.paths())


def test_unknown_recipe_names_the_nearest(model_folders: Folders) -> None:
    with pytest.raises(DQError, match=r"unknown recipe 'w4a9-dynamc'\..*Known: .*w4a8"):
        DQPipeline.from_pretrained(model_folders("sd32"), "w4a9-dynamc")
    with pytest.raises(DQError, match="Did you mean 'w8a8'"):
        DQPipeline.from_pretrained(model_folders("sd32"), "w8a8x")
    with pytest.raises(DQError, match=r"nothing\.yaml does not exist"):
        DQPipeline.from_pretrained(model_folders("sd32"), "nothing.yaml")


@pytest.mark.parametrize("recipe", ["w8a8-dynamic", static(8)], ids=["fly", "place"])
def test_unknown_component(model_folders: Folders, recipe: Any) -> None:
    with pytest.raises(DQError, match="Did you mean 'unet'"):
        DQPipeline.from_pretrained(model_folders("sd32"), recipe, component="unett")
    with pytest.raises(DQError, match="'vae' is a AutoencoderKL; quantizable: unet"):
        DQPipeline.from_pretrained(model_folders("sd32"), recipe, component="vae")
    pipe = DQPipeline.from_pretrained(model_folders("sd32"))
    with pytest.raises(DQError, match="Did you mean 'unet'"):
        pipe.quantize(recipe, component="unett")
    assert pipe.plan is None


def test_quantized_once_only(packed_folders: PackedFolders) -> None:
    folder = packed_folders("sd32", "w4a16")
    with pytest.raises(DQError, match="quantized already"):
        DQPipeline.from_pretrained(folder, "w8a8-dynamic")
    pipe = DQPipeline.from_pretrained(folder)
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    plan = pipe.plan
    with pytest.raises(DQError, match="quantized already"):
        pipe.quantize("w8a8-dynamic")
    assert pipe.plan == plan
    assert all(torch.equal(before[k], v) for k, v in pipe.unet.state_dict().items())
    # Its weights made float, it may be quantized anew.
    pipe.unet.dequantize()
    assert pipe.plan is None
    pipe.quantize("w8a8-dynamic")
    assert {spec.weight.format for spec in pipe.plan.layers.values()} == {"int8"}


def test_a_failure_leaves_the_pipeline_as_it_was(model_folders: Folders) -> None:
    pipe = finish(DQPipeline.from_pretrained(model_folders("sd32")))
    with torch.no_grad():
        pipe.unet.mid_block.resnets[0].norm1.weight[0] = float("nan")
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    kinds = {name: type(module) for name, module in pipe.unet.named_modules()}
    with pytest.raises(DQError, match="not finite"):
        pipe.quantize(static(8))
    assert {name: type(module) for name, module in pipe.unet.named_modules()} == kinds
    after = pipe.unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], v) or v.isnan().any() for k, v in before.items())
    assert pipe.plan is None
    assert pipe.recipe is None
    assert not getattr(pipe.unet, "is_quantized", False)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_travels_with_the_checkpoint(
    recipe: str, packed_folders: PackedFolders, tmp_path: Path
) -> None:
    folder = packed_folders("dit64", recipe)
    expected = Recipe.get(RECIPES[recipe])
    assert json.loads((folder / "dq_recipe.json").read_text()) == json.loads(
        json.dumps(expected.to_dict())
    )
    pipe = DQPipeline.from_pretrained(folder)
    assert pipe.recipe == expected
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "dq_recipe.json").read_text() == (folder / "dq_recipe.json").read_text()
    # The file is a recipe like any other.
    assert Recipe.get(tmp_path / "dq_recipe.json") == expected


def test_a_recipe_of_a_missing_plugin_does_not_block_loading(
    packed_folders: PackedFolders, tmp_path: Path
) -> None:
    folder = shutil.copytree(packed_folders("dit64", "w4a16"), tmp_path / "model")
    text = '{"name": "theirs", "steps": [{"method": "theirs"}]}'
    (folder / "dq_recipe.json").write_text(text)
    pipe = DQPipeline.from_pretrained(folder)
    assert pipe.plan is not None
    with pytest.raises(DQError, match="unknown method 'theirs'"):
        _ = pipe.recipe
    pipe.save_pretrained(tmp_path / "again")
    stored = (tmp_path / "again" / "dq_recipe.json").read_text()
    assert json.loads(stored) == json.loads(text)


def test_float_pipelines_are_saved_without_recipe(model_folders: Folders, tmp_path: Path) -> None:
    DQPipeline.from_pretrained(model_folders("sd32")).save_pretrained(tmp_path)
    assert not (tmp_path / "dq_recipe.json").exists()
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is StableDiffusionPipeline


def test_prompts_travel_with_the_checkpoint(model_folders: Folders, tmp_path: Path) -> None:
    pipe = DQPipeline.from_pretrained(model_folders("sd32"), "w8a8-dynamic")
    pipe.dq_prompts = ("a fox", "a red apple")
    pipe.save_pretrained(tmp_path)
    assert DQPipeline.from_pretrained(tmp_path).dq_prompts == ("a fox", "a red apple")


_QUANTIZE = """
import json, sys
import torch
torch.set_num_threads(1)
from dq import DQPipeline
DQPipeline.from_pretrained(sys.argv[1], json.loads(sys.argv[2]), work_dir=sys.argv[3])
"""


def test_a_killed_calibration_continues(model_folders: Folders, tmp_path: Path) -> None:
    recipe = {**static(4), "calibration": {"n": 24, "steps": 3, "batch": 2}}
    folder, work = model_folders("sd32"), tmp_path / "work"
    arguments = [sys.executable, "-P", "-c", _QUANTIZE, folder, json.dumps(recipe), work]
    with subprocess.Popen(arguments, stderr=subprocess.DEVNULL, cwd="/") as process:
        deadline = time.monotonic() + 120
        while len(calls(work)) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    done = calls(work)
    assert 3 <= len(done) < 12, "killed too early or too late"
    resumed = DQPipeline.from_pretrained(folder, recipe, work_dir=work)
    after = calls(work)
    assert len(after) == 12
    assert {path: after[path] for path in done} == done, "a finished stage was computed again"
    straight = DQPipeline.from_pretrained(folder, recipe)
    assert resumed.plan == straight.plan
    assert same_state(resumed.unet, straight.unet)


def calls(work: Path) -> dict[Path, int]:
    """Returns when each captured batch was written."""
    return {path: path.stat().st_mtime_ns for path in work.rglob("calls-*.safetensors")}


_MEMORY = """
import json, sys, threading, time
import torch
torch.set_num_threads(1)
from dq import DQConfig
from diffusers import UNet2DConditionModel

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))

def load(folder):
    config = {"quantization_config": DQConfig(recipe)} if recipe else {}
    return UNet2DConditionModel.from_pretrained(folder, **config)

def watch():
    while not done.is_set():
        highest[0] = max(highest[0], status("RssAnon"))
        time.sleep(0.001)

small, large, recipe = json.loads(sys.argv[1])
load(small)  # libraries are paged in, kernels have been tried
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # VmHWM starts anew
before, anonymous, highest, done = status("VmRSS"), status("RssAnon"), [0], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
model = load(large)
done.set()
thread.join()
print(json.dumps({"all": status("VmHWM") - before, "anonymous": highest[0] - anonymous}))
"""


@pytest.fixture(scope="module")
def mid_sized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, UNet2DConditionModel]:
    """A float UNet of 49.8 M parameters: its folder, and the model quantized to 8 bits."""
    folder = tmp_path_factory.mktemp("mid-sized")
    with seeded():
        model = UNet2DConditionModel(
            block_out_channels=(128, 256, 384),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=128,
            sample_size=32,
        )
    model.save_pretrained(folder)
    packed = UNet2DConditionModel.from_pretrained(
        folder, quantization_config=DQConfig("w8a8-dynamic")
    )
    return folder, packed


def memory(small: Path, large: Path, recipe: str | None) -> dict[str, int]:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("memory is measured by Linux' /proc")
    # glibc would keep what large temporaries leave in its heap; mapped, they go back at once.
    jobs = json.dumps([str(small), str(large), recipe])
    done = run(_MEMORY, jobs, MALLOC_MMAP_THRESHOLD_=str(2_000_000))
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


def sizes(model: torch.nn.Module) -> tuple[int, int]:
    """Returns the bytes of all tensors, and of the largest layer in float32."""
    stored = sum(tensor.nbytes for tensor in model.state_dict().values())
    return stored, max(4 * x.rows * x.columns for x in packed_layers(model).values())


def test_loading_packed_weights_takes_their_size(
    mid_sized: tuple[Path, UNet2DConditionModel], packed_folders: PackedFolders, tmp_path: Path
) -> None:
    """All resident pages count, those of the mapped file too."""
    _, packed = mid_sized
    packed.save_pretrained(tmp_path)
    found = memory(packed_folders("sd32", "w8a8-dynamic") / "unet", tmp_path, None)
    stored, largest = sizes(packed)
    assert 0.9 * stored < found["all"] < 1.1 * stored + largest
    assert found["anonymous"] < largest


def test_quantizing_on_the_fly_holds_no_float_model(
    mid_sized: tuple[Path, UNet2DConditionModel], model_folders: Folders
) -> None:
    """Pages of the float file are mapped and can be dropped any time; our own memory counts."""
    folder, packed = mid_sized
    found = memory(model_folders("sd32") / "unet", folder, "w8a8-dynamic")
    stored, largest = sizes(packed)
    assert 0.9 * stored < found["anonymous"] < 1.1 * stored + 3 * largest
