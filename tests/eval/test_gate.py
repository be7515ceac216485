import pytest

from dq.errors import DQError
from dq.eval.gate import Gate, gates

METRICS = {"fid": 2.0, "psnr": 30.0, "clip": 80.0, "broken": float("nan")}
BASELINE = {"clip": 81.0}


@pytest.mark.parametrize(
    ("kind", "text", "line"),
    [
        ("max", "fid=2", None),
        ("max", "fid=1.5", "fid: 2 is not at most 1.5"),
        ("min", "psnr=30", None),
        ("min", "psnr=31", "psnr: 30 is not at least 31"),
        ("max-drop", "clip=1", None),
        ("max-drop", "clip=0.5", "clip: 1 is not no more below full precision than 0.5"),
        ("max", "broken=1", "broken: nan is not at most 1"),
        ("min", "broken=1", "broken: nan is not at least 1"),
    ],
)
def test_thresholds(kind: str, text: str, line: str | None) -> None:
    assert Gate.parse(kind, text).failure(METRICS, BASELINE) == line


@pytest.mark.parametrize("text", ["fid", "=3", "fid=", "fid=much", "fid=inf"])
def test_unreadable(text: str) -> None:
    with pytest.raises(DQError, match="expected a metric and a number"):
        Gate.parse("max", text)


def test_scores_that_are_not_there() -> None:
    with pytest.raises(DQError, match="unknown metric 'fod'"):
        Gate("max", "fod", 1.0).failure(METRICS, BASELINE)
    with pytest.raises(DQError, match="full precision has no such score"):
        Gate("max-drop", "fid", 1.0).failure(METRICS, BASELINE)


def test_all_kinds_at_once() -> None:
    found = gates(["fid=1", "kid=2"], ["psnr=3"], ["clip=4"])
    assert [(g.kind, g.metric, g.limit) for g in found] == [
        ("max", "fid", 1.0), ("max", "kid", 2.0), ("min", "psnr", 3.0), ("max-drop", "clip", 4.0)
    ]  # fmt: skip
