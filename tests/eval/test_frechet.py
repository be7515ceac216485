import time
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from dq.errors import DQError
from dq.eval.features import extractors
from dq.eval.frechet import Moments, frechet_distance, frechet_distance_of_features


def features(count: int, dimension: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimension, dimension, generator=generator)
    return torch.randn(count, dimension, generator=generator) @ mixing + seed


def textbook(one: torch.Tensor, two: torch.Tensor) -> float:
    """The formula as pytorch-fid writes it down, in scipy."""
    a, b = one.double().numpy(), two.double().numpy()
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(s1 @ s2)
    apart = a.mean(0) - b.mean(0)
    return float(apart @ apart + np.trace(s1) + np.trace(s2) - 2 * np.trace(root.real))


@pytest.mark.parametrize(("n", "m"), [(60, 60), (60, 200), (300, 40)])
def test_equals_the_textbook(n: int, m: int) -> None:
    one, two = features(n, 24, 1), features(m, 24, 2)
    assert frechet_distance_of_features(one, two) == pytest.approx(textbook(one, two), rel=1e-8)


@pytest.mark.parametrize(("n", "m"), [(10, 10), (10, 200), (2, 3)])
def test_the_short_way_is_exact(n: int, m: int) -> None:
    one, two = features(n, 32, 1), features(m, 32, 2)
    short = frechet_distance_of_features(one, two)
    assert short == pytest.approx(frechet_distance(Moments.of(one), Moments.of(two)), rel=1e-6)


def test_equals_torchmetrics() -> None:
    class Given(nn.Module):
        num_features = 24

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, :24].float()

    one, two = features(200, 24, 1), features(200, 24, 2)
    metric = FrechetInceptionDistance(feature=Given())
    metric.update(one.view(200, 24, 1, 1), real=True)
    metric.update(two.view(200, 24, 1, 1), real=False)
    ours = frechet_distance_of_features(one, two)
    assert ours == pytest.approx(float(metric.compute()), rel=1e-3)


@pytest.mark.parametrize("count", [8, 100])
def test_equal_sets_are_at_no_distance(count: int) -> None:
    one = features(count, 24)
    assert frechet_distance_of_features(one, one.flip(0)) == pytest.approx(0, abs=1e-5)


def test_moments_merge_as_if_seen_at_once() -> None:
    x = features(103, 12) + 1e4  # far from zero: sums of squares would lose all digits
    parts = [Moments.of(part) for part in x.split(20)]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.merged(part)
    expected = Moments.of(x)
    assert whole.count == 103
    assert torch.allclose(whole.mean, expected.mean)
    assert torch.allclose(whole.covariance, expected.covariance)


@pytest.mark.parametrize("batch", [2, 20, 51])
def test_moments_of_batches(batch: int) -> None:
    x = features(103, 12)  # a last batch of one is a batch as well
    found, expected = Moments.over(x.split(batch)), Moments.of(x)
    assert found.count == 103
    assert torch.allclose(found.mean, expected.mean)
    assert torch.allclose(found.covariance, expected.covariance)
    with pytest.raises(DQError, match="at least 2 images"):
        Moments.over(x[:1].split(1))


def test_2048_features_of_512_images_take_no_time() -> None:
    one, two = (torch.randn(512, 2048, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    start = time.perf_counter()
    assert 2000 < frechet_distance_of_features(one, two) < 4000
    assert time.perf_counter() - start < 2


def test_halves_of_real_pictures() -> None:
    """The pictures of the documentation: 24 of each checkpoint, in tiles."""
    extractor = extractors["emoji-clip"](None, "clean", "cpu")
    folder = Path(__file__).parents[2] / "docs" / "images"
    halves = []
    for name in ("emoji-unet.png", "emoji-dit.png"):
        sheet = torch.from_numpy(np.array(Image.open(folder / name).convert("RGB"))).permute(
            2, 0, 1
        )
        tiles = sheet.unfold(1, 64, 64).unfold(2, 64, 64).permute(1, 2, 0, 3, 4)
        halves.append(extractor(tiles.reshape(-1, 3, 64, 64)))
    one, two = (half[:, :20] for half in halves)  # fewer than images: scipy needs full rank
    assert min(len(one), len(two)) > 24
    assert frechet_distance_of_features(one, two) == pytest.approx(textbook(one, two), rel=1e-6)


def test_mistakes() -> None:
    one = features(10, 8)
    for distance in (
        frechet_distance_of_features,
        lambda a, b: frechet_distance(*map(Moments.of, (a, b))),
    ):
        with pytest.raises(DQError, match="at least 2 images, not 1"):
            distance(one[:1], one)
        with pytest.raises(DQError, match="of 8 and of 7 dimensions"):
            distance(one, one[:, :7])
