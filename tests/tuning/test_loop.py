"""The tuning loop on a problem whose answer is known."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dq.calls import Call
from dq.errors import DQError
from dq.tuning.loop import Group, Schedule, tune
from dq.tuning.samples import Samples
from dq.work import Work


class Line(nn.Module):
    """y = 3 x - 1, to be found."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(()))
        self.offset = nn.Parameter(torch.zeros(1))

    def forward(self, sample: Tensor) -> Tensor:
        return self.slope * sample + self.offset

    def loss(self, call: Call) -> Tensor:
        x = call["sample"]
        return (self(x) - (3 * x - 1)).square().mean()


def data(seed: int) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    calls = [{"sample": torch.randn(10, 1, generator=generator)} for _ in range(4)]
    return Samples(calls, "sample")


class Killed(Line):
    """Dies once, after so many calls of its loss with gradients."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def loss(self, call: Call) -> Tensor:
        if torch.is_grad_enabled():
            self.after -= 1
            if self.after < 0:
                raise KeyboardInterrupt
        return super().loss(call)


def run(model: Line, folder: Path | None = None, rate: float = 0.1, **settings: int):
    schedule = Schedule(**{"steps": 60, "batch": 6, **settings})
    groups = [Group([model.slope], rate), Group([model.offset], rate)]
    own, others = data(0), data(1)
    return tune(groups, model.loss, own, others, schedule, Work(folder), "stage")


def test_it_finds_the_answer() -> None:
    model = Line()
    found = run(model, steps=200)
    assert model.slope.item() == pytest.approx(3, abs=0.05)
    assert model.offset.item() == pytest.approx(-1, abs=0.05)
    assert found.best < 0.01 < found.start
    assert found.losses.shape == (200,)
    assert found.losses[-20:].mean() < 0.01 < found.losses[0]


def test_it_never_ends_above_the_start() -> None:
    model = Line()
    with torch.no_grad():
        model.slope.fill_(3)
        model.offset.fill_(-1)
    found = run(model, rate=50.0, steps=5)
    assert (found.step, found.best) == (0, found.start)
    assert (model.slope.item(), model.offset.item()) == (3, -1)


@pytest.mark.parametrize("after", [0, 5, 6, 31, 59])
def test_a_killed_run_ends_in_the_same_bits(after: int, tmp_path: Path) -> None:
    whole = Line()
    expected = run(whole)
    broken = Killed(after)
    with pytest.raises(KeyboardInterrupt):
        run(broken, tmp_path)
    again = Line()
    found = run(again, tmp_path)
    assert torch.equal(again.slope, whole.slope)
    assert torch.equal(again.offset, whole.offset)
    assert found[:3] == expected[:3]
    assert torch.equal(found.losses, expected.losses)


def test_a_finished_run_is_taken_over(tmp_path: Path) -> None:
    first = Line()
    run(first, tmp_path)
    again = Killed(0)
    run(again, tmp_path)
    assert torch.equal(again.slope, first.slope)


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_parts_of_a_step_add_up_to_it(parts: int) -> None:
    whole, cut = Line(), Line()
    run(whole, steps=20)
    run(cut, steps=20, accumulate=parts)
    assert cut.slope.item() == pytest.approx(whole.slope.item(), rel=1e-4)


def test_every_sample_is_seen_once_in_an_epoch() -> None:
    seen: list[float] = []
    model = Line()

    def loss(call: Call) -> Tensor:
        if torch.is_grad_enabled():
            seen.extend(call["sample"].flatten().tolist())
        return model.loss(call)

    own = data(0)
    schedule = Schedule(steps=20, batch=6)  # 120 of 40: three epochs, whose ends no batch meets
    tune([Group([model.slope], 0.1)], loss, own, data(1), schedule, Work(None), "s")
    everything = sorted(own.batch(range(40))["sample"].flatten().tolist())
    for epoch in range(3):
        assert sorted(seen[40 * epoch : 40 * epoch + 40]) == everything
    assert seen[:40] != seen[40:80]


def test_steps_know_how_far_the_run_is_and_states_are_chosen_by_its_end() -> None:
    model, told, judged = Line(), [], []
    now = 0.0

    def at(progress: float) -> None:
        nonlocal now
        now = progress

    def loss(call: Call) -> Tensor:
        (told if torch.is_grad_enabled() else judged).append(now)
        return model.loss(call) + (0.0 if now == 1 else -100.0)  # on the way it seems better

    schedule = Schedule(steps=20, batch=6)
    groups = [Group([model.slope], 0.1)]
    found = tune(groups, loss, data(0), data(1), schedule, Work(None), "s", at)
    assert told == [step / 20 for step in range(20)]
    assert set(judged) == {1.0}
    assert found.best > 0
    assert now == 1.0


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(DQError, match="not finite in step 0; lower the learning rates"):
        model = Line()
        model.loss = lambda call: model.slope * torch.nan  # type: ignore[method-assign]
        run(model)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"steps": 0}, "steps is 1 or more, not 0"),
        ({"batch": 0}, "batch is 1 or more, not 0"),
        ({"accumulate": 4}, "accumulate 4 does not divide batch 6"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(settings: dict[str, int], text: str) -> None:
    with pytest.raises(DQError, match=text):
        Schedule(**{"steps": 60, "batch": 6, **settings})
