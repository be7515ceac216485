"""The timestep is read from the call, whatever form it has there."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dq.errors import DQError
from dq.nn.steps import Steps, noted, watch


class Denoiser(nn.Module):
    """Takes a timestep as those of diffusers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, sample: Tensor, timestep: Any, scale: float = 1.0) -> Tensor:
        return self.layer(sample)


@pytest.mark.parametrize(
    "given", [500, 500.0, torch.tensor(500), torch.tensor([500]), torch.full((3,), 500.0)]
)
@pytest.mark.parametrize("by_name", [False, True])
def test_one_timestep_for_all_rows(given: Any, by_name: bool) -> None:
    model, x = Denoiser(), torch.zeros(3, 2)
    with noted(model) as steps:
        model(x, timestep=given) if by_name else model(x, given)
    assert steps.now().tolist() == [500.0]
    assert steps.nearest((0.0, 400.0, 900.0)) == 1
    found = steps.exactly((100.0, 500.0))
    assert found.whole is True
    assert found.row.tolist() == [1]
    assert steps.exactly((100.0, 499.0)).whole is False


def test_rows_of_their_own() -> None:
    model = Denoiser()
    with noted(model) as steps:
        model(torch.zeros(3, 2), torch.tensor([10, 600, 999]))
    index = steps.nearest((0.0, 1000.0))
    assert isinstance(index, Tensor)
    assert index.tolist() == [0, 1, 1]
    found = steps.exactly((10.0, 999.0))
    assert found.whole is None
    assert found.hit.tolist() == [True, False, True]
    assert found.row[0] == 0
    assert found.row[2] == 1


@pytest.mark.parametrize(
    ("now", "nearest"), [(-50, 0), (0, 0), (299, 0), (300, 0), (301, 1), (650, 1), (5000, 2)]
)
def test_timesteps_that_were_never_calibrated(now: int, nearest: int) -> None:
    model = Denoiser()
    with noted(model) as steps:
        model(torch.zeros(1, 2), now)
    assert steps.nearest((100.0, 500.0, 900.0)) == nearest


def test_a_later_call_replaces_an_earlier_one() -> None:
    model = Denoiser()
    with noted(model) as steps:
        for now, expected in ((0, 0), (1000, 1), (0, 0)):
            model(torch.zeros(1, 2), now)
            assert steps.nearest((0.0, 1000.0)) == expected
    model(torch.zeros(1, 2), 1000)  # no longer looked at
    assert steps.nearest((0.0, 1000.0)) == 0


def test_without_a_timestep_it_says_so() -> None:
    with pytest.raises(DQError, match="Linear is not told the timestep"):
        Steps(nn.Linear(2, 2))
    with pytest.raises(DQError, match="call it through its denoiser"):
        Steps(Denoiser()).now()


class Waiting(nn.Linear):
    """A layer that wants to know the timestep."""

    depends_on_step = True
    steps: Steps | None = None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_a_timestep_of_their_own(copied: Any) -> None:
    model = Denoiser()
    model.layer = Waiting(2, 2)
    watch(model)
    model(torch.zeros(1, 2), 7)
    other = copied(model)
    other(torch.zeros(1, 2), 9)
    assert model.layer.steps.now().tolist() == [7.0]
    assert other.layer.steps.now().tolist() == [9.0]


def test_watching_twice_is_once_and_ends_with_the_last_layer() -> None:
    model = Denoiser()
    model.layer = Waiting(2, 2)
    watch(model)
    watch(model)
    assert len(model._forward_pre_hooks) == 1
    model.layer = nn.Linear(2, 2)
    watch(model)
    assert not model._forward_pre_hooks
