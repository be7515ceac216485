"""Same numbers on every machine: one thread, fixed seeds, no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import random

import hypothesis
import numpy as np
import pytest
import torch

pytest_plugins = ["tests.fixtures"]

torch.set_num_threads(1)
hypothesis.settings.register_profile("dq", derandomize=True, deadline=None)
hypothesis.settings.load_profile("dq")


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
