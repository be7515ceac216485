"""A data-free recipe quantizes tensor by tensor: no float copy of the model is ever there."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel

LOAD = """
import sys, torch
from diffusers import DiTTransformer2DModel
from dq import DQConfig
from dq.memory import peak_allocated
from dq.pipelines.footprint import footprint

small, large = sys.argv[1:]
def load(folder):
    config = DQConfig("fp8")
    return DiTTransformer2DModel.from_pretrained(
        folder, quantization_config=config, torch_dtype=torch.bfloat16
    )
load(small)  # what is imported and set up once is not the model's
held = []
peak = peak_allocated(lambda: held.append(load(large)))
count = footprint(held[0])
print(peak, count.stored_bytes, max(layer.weights for layer in count.layers))
"""


def saved(folder: Path, layers: int, heads: int) -> Path:
    model = DiTTransformer2DModel(
        num_layers=layers, num_attention_heads=heads, attention_head_dim=64, in_channels=4,
        sample_size=16, patch_size=2,
    )  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_fp8_takes_the_memory_of_its_codes_and_of_one_layer(tmp_path: Path) -> None:
    folders = saved(tmp_path / "small", 1, 2), saved(tmp_path / "large", 12, 12)
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOAD, *map(str, folders)],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, stored, largest = map(int, done.stdout.split())
    assert stored > 150e6
    assert peak > 0.9 * stored
    assert peak <= 1.1 * (stored + 2 * largest)  # of bfloat16 weights
