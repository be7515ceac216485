import os
from pathlib import Path

import pytest
import torch
from torch import nn

from dq.errors import DQError
from dq.work import Work, fingerprint

TENSORS = {
    "a.low": torch.arange(5.0),
    "a.high": torch.ones(2, 3, dtype=torch.bfloat16).t(),  # not contiguous
    "step": torch.tensor(7),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))


def test_a_finished_stage_comes_back_bit_for_bit(tmp_path: Path) -> None:
    work = Work(tmp_path / "made" / "on demand")
    assert work.load("ranges") is None
    work.save("ranges", TENSORS)
    loaded = Work(tmp_path / "made" / "on demand").load("ranges")
    assert loaded is not None
    assert set(loaded) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_stages_are_kept_apart_and_may_be_written_again(tmp_path: Path) -> None:
    work = Work(tmp_path)
    for value, stage in ((1.0, "one"), (2.0, "two"), (3.0, "one")):
        work.save(stage, {"x": torch.tensor(value)})
    assert work.load("one") == {"x": torch.tensor(3.0)}
    assert work.load("two") == {"x": torch.tensor(2.0)}


def test_tensors_that_share_memory_are_written(tmp_path: Path) -> None:
    x = torch.randn(4)
    Work(tmp_path).save("s", {"a": x, "b": x, "c": x[:2]})
    assert torch.equal(Work(tmp_path).load("s")["c"], x[:2])


def test_without_a_folder_nothing_is_kept() -> None:
    work = Work(None)
    work.save("ranges", TENSORS)
    assert work.load("ranges") is None


def test_a_kill_while_writing_leaves_the_stage_unfinished(tmp_path: Path) -> None:
    class Killed:
        def detach(self) -> torch.Tensor:
            raise KeyboardInterrupt

    work = Work(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        work.save("s", {"a": Killed()})
    assert work.load("s") is None
    (tmp_path / f"s.{os.getpid()}.tmp").write_bytes(b"half a file")
    assert work.load("s") is None
    work.save("s", {"a": torch.ones(1)})
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


@pytest.mark.parametrize("content", [b"", b"not a stage", b"\xff" * 100])
def test_a_damaged_stage_is_named_with_the_remedy(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s.safetensors").write_bytes(content)
    with pytest.raises(DQError, match=r"s\.safetensors is damaged .*; delete it and run again"):
        Work(tmp_path).load("s")


def test_equal_jobs_have_equal_fingerprints() -> None:
    first = fingerprint(model(), {"n": 1, "seed": 2})
    assert first == fingerprint(model(), {"seed": 2, "n": 1})
    assert len(first) == 16
    assert int(first, 16) >= 0


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m[0].weight.data[0, 0].add_(1e-3),
        lambda m: m[1].running_mean.add_(1),
        lambda m: m.bfloat16(),
        lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.detach().view(8, 4))),
        lambda m: m.append(nn.Linear(1, 1)),
    ],
)
def test_a_change_of_the_model_changes_the_fingerprint(change) -> None:
    changed = model()
    change(changed)
    assert fingerprint(changed, {}) != fingerprint(model(), {})


def test_a_change_of_the_settings_changes_the_fingerprint() -> None:
    assert fingerprint(model(), {"seed": 1}) != fingerprint(model(), {"seed": 2})


def test_models_without_values_have_fingerprints() -> None:
    assert fingerprint(model().to("meta"), {}) == fingerprint(model().to("meta"), {})
