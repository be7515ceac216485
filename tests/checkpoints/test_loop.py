from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dq.checkpoints.train.loop import Plan, Run
from dq.errors import DQError

PLAN = Plan(steps=12, lr=1e-2, batch=4, warmup=3, decay=4, seed=5)


class Tiny:
    """Learns a fixed linear map from noise."""

    name = "tiny"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 3))
        self.target = torch.randn(6, 3)
        self.stop_at, self.calls = -1, 0

    def loss(self, generator: torch.Generator) -> Tensor:
        x = torch.randn(4, 6, generator=generator)
        self.calls += 1
        if self.calls == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return (self.model(x).float() - x @ self.target).square().mean()


def finished(run: Run) -> dict[str, Tensor]:
    run.train()
    weights = {f"model.{k}": v for k, v in run.trainee.model.state_dict().items()}
    return weights | {f"ema.{k}": v for k, v in run.ema.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole = finished(Run(Tiny(), PLAN, tmp_path / "whole"))
    first = Run(Tiny(), PLAN, tmp_path / "parts")
    first.trainee.stop_at = 5
    first.train()
    assert first.step == 5
    second = Run(Tiny(), PLAN, tmp_path / "parts")
    second.load()
    assert_same(finished(second), whole)


def test_stable_state_can_be_extended(tmp_path: Path) -> None:
    Run(Tiny(), PLAN, tmp_path).train()
    longer = replace(PLAN, steps=20)
    whole = finished(Run(Tiny(), longer, tmp_path / "whole"))
    run = Run(Tiny(), longer, tmp_path)
    run.load("stable.pt")
    assert run.step == PLAN.steps - PLAN.decay
    assert_same(finished(run), whole)


def test_rate_warms_up_holds_and_decays() -> None:
    rates = [PLAN.rate(step) / PLAN.lr for step in range(PLAN.steps)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1, 3 / 4, 1 / 2, 1 / 4])


def test_log_and_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Run(Tiny(), PLAN, tmp_path).train()
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == PLAN.steps
    shown = capsys.readouterr().err
    assert all(word in shown for word in ("tiny 12/12", "loss", "steps/s", "left 0:00:00"))


def test_nothing_to_continue_from(tmp_path: Path) -> None:
    with pytest.raises(DQError, match=r"state\.pt does not exist"):
        Run(Tiny(), PLAN, tmp_path).load()
