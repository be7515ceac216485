"""Rows of captured calls."""

import pytest
import torch

from dq.calls import Call
from dq.errors import DQError
from dq.tuning.samples import Samples


def calls(sizes: tuple[int, ...] = (2, 4)) -> list[Call]:
    made = []
    for index, size in enumerate(sizes):
        rows = torch.arange(size, dtype=torch.float32).view(size, 1) + 100 * index
        made.append(
            {
                "added": {"text": rows * 2},
                "encoder_hidden_states": rows * 3,
                "ids": torch.arange(7),
                "sample": rows,
                "timestep": torch.tensor(900 - index),
            }
        )
    return made


def test_rows_keep_what_belongs_to_them() -> None:
    samples = Samples(calls(), "sample")
    assert len(samples) == 6
    batch = samples.batch([5, 0, 2])
    assert batch["sample"].flatten().tolist() == [103, 0, 100]
    assert batch["timestep"].tolist() == [899, 900, 899]
    assert torch.equal(batch["encoder_hidden_states"], batch["sample"] * 3)
    assert torch.equal(batch["added"]["text"], batch["sample"] * 2)
    assert torch.equal(batch["ids"], torch.arange(7))


@pytest.mark.parametrize("form", ["()", "(1,)", "(B,)"])
def test_timesteps_may_have_any_form(form: str) -> None:
    call = calls((3,))[0]
    shape = {"()": (), "(1,)": (1,), "(B,)": (3,)}[form]
    call["timestep"] = torch.full(shape, 7)
    assert Samples([call], "sample").batch([2, 1])["timestep"].tolist() == [7, 7]


def test_equal_tensors_are_kept_once() -> None:
    prompt = torch.randn(2, 77, 8)
    made = [
        {"sample": torch.randn(2, 4), "timestep": torch.tensor(t), "encoder_hidden_states": p}
        for t, p in ((9, prompt), (5, prompt.clone()), (1, prompt.clone()))
    ]
    samples = Samples(made, "sample")
    kept = {tensors["encoder_hidden_states"].data_ptr() for _, tensors in samples._calls}
    assert len(kept) == 1


def test_orders_depend_on_the_seed_alone() -> None:
    samples = Samples(calls(), "sample")
    assert samples.shuffled(3) == samples.shuffled(3)
    assert samples.shuffled(3) != samples.shuffled(4)
    assert sorted(samples.shuffled(3)) == [0, 1, 2, 3, 4, 5]


def test_without_calls_there_is_nothing_to_learn() -> None:
    with pytest.raises(DQError, match="no captured calls"):
        Samples([], "sample")
