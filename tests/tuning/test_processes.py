"""Two processes learn what one does: each works on its share of every batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dq.work import Work

SCRIPT = """
import sys
from pathlib import Path

import torch

from dq.calibrate import CalibrationSpec
from dq.engine import quantize
from dq.methods.ptq import PTQ
from dq.methods.quest import QuEST
from dq.recipe import Recipe
from tests.models import MODELS
from tests.sources import Samples

torch.set_num_threads(1)
model = MODELS["dit64"].network(MODELS["dit64"].build()).eval()
steps = PTQ("int4", "int8", "static"), QuEST(steps=8, batch=4, accumulate=2)
recipe = Recipe("t", steps, CalibrationSpec(n=4, steps=2, batch=2))
quantize(model, recipe, Samples(model), Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tmp_path: Path) -> None:
    script = tmp_path / "learn.py"
    script.write_text(SCRIPT)
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    root = str(Path(__file__).parents[2])
    states = []
    for name, before in (("one", []), ("two", launch)):
        subprocess.run(
            [sys.executable, *before, str(script), str(tmp_path / name)],
            check=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        )
        (stage,) = (tmp_path / name).rglob("quest-0.safetensors")
        state = Work(stage.parent).load("quest-0")
        assert state is not None
        states.append(state)
    one, two = states
    assert one.keys() == two.keys()
    assert torch.allclose(one["losses"], two["losses"], rtol=1e-5)
    assert torch.allclose(one["loss"], two["loss"], rtol=1e-5)
    for name in one:
        assert torch.allclose(one[name].double(), two[name].double(), rtol=1e-3, atol=1e-5)
