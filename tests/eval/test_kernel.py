import math

import pytest
import torch
from torch import nn
from torchmetrics.image.kid import KernelInceptionDistance

from dq.errors import DQError
from dq.eval.kernel import cmmd, kid


def features(count: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed)) + shift


def mmd(x: torch.Tensor, y: torch.Tensor, kernel) -> float:
    """The definition, pair by pair."""

    def mean(a, b, same: bool) -> float:
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (same and i == j)]
        return sum(float(kernel(a[i], b[j])) for i, j in pairs) / len(pairs)

    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


def test_kid_of_all_images_equals_the_definition() -> None:
    x, y = features(12, 0).double(), features(12, 1, 0.3).double()
    expected = mmd(x, y, lambda a, b: (a @ b / 16 + 1) ** 3)
    found = kid(x, y)
    assert found.value == pytest.approx(expected, rel=1e-10)
    assert found.error > 0


def test_kid_equals_torchmetrics() -> None:
    class Given(nn.Module):
        num_features = 16

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, :16].float()

    x, y = features(150, 0), features(150, 1, 0.3)
    metric = KernelInceptionDistance(feature=Given(), subsets=1, subset_size=150)
    metric.update(x.view(150, 16, 1, 1), real=True)
    metric.update(y.view(150, 16, 1, 1), real=False)
    assert kid(x, y).value == pytest.approx(float(metric.compute()[0]), rel=1e-3)


def test_kid_tells_sets_apart_and_knows_how_surely() -> None:
    same = kid(features(400, 0), features(400, 1))
    apart = kid(features(400, 0), features(400, 1, 0.5))
    assert abs(same.value) < 4 * same.error
    assert apart.value > 10 * apart.error


def test_subsets_repeat_and_are_unbiased() -> None:
    x, y = features(300, 0), features(200, 1, 0.3)
    some = kid(x, y, subset=50, subsets=200)
    assert some == kid(x, y, subset=50, subsets=200)
    assert some != kid(x, y, subset=50, subsets=200, seed=1)
    whole = kid(x[:200], y).value
    assert some.value == pytest.approx(whole, abs=5 * some.error + 0.02)


def test_cmmd_equals_the_definition() -> None:
    x, y = features(9, 0).double(), features(11, 1, 0.3).double()
    one, two = (torch.nn.functional.normalize(f, dim=1) for f in (x, y))
    expected = mmd(one, two, lambda a, b: math.exp(-float((a - b).square().sum()) / 200))
    assert cmmd(x, y) == pytest.approx(1000 * expected, rel=1e-6)


def test_paired_sets_leave_out_their_pairs() -> None:
    x = features(40, 0).double()
    assert kid(x, x, paired=True).value == pytest.approx(0, abs=1e-12)
    assert cmmd(x, x, paired=True) == pytest.approx(0, abs=1e-9)
    assert kid(x, x).value < -0.01  # as if closer than equal
    near, far = (kid(x, x + s * features(40, 1), paired=True).value for s in (0.1, 1.0))
    assert abs(near) < far
    some = kid(x, x, subset=10, subsets=5, paired=True)
    assert some.value == pytest.approx(0, abs=1e-12)
    for distance in (kid, cmmd):
        with pytest.raises(DQError, match="40 images cannot be paired with 39"):
            distance(x, x[:-1], paired=True)


@pytest.mark.parametrize("distance", [kid, cmmd])
def test_mistakes(distance) -> None:
    with pytest.raises(DQError, match="at least 2 images on each side, not 1"):
        distance(features(1, 0), features(5, 0))
    with pytest.raises(DQError, match="of 16 and of 8 dimensions"):
        distance(features(5, 0), features(5, 0)[:, :8])
