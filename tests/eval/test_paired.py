import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.image import structural_similarity_index_measure

from dq.errors import DQError
from dq.eval.paired import Paired, paired_cosine, paired_lpips, paired_psnr, paired_ssim
from dq.eval.score import check_metrics


def stack(seed: int, count: int = 4, size: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def pictures(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


@pytest.mark.parametrize("metric", [paired_psnr, paired_ssim])
def test_pictures_and_tensors_score_alike(metric) -> None:
    one, two = stack(0), stack(1)
    assert metric(one, two) == metric(pictures(one), pictures(two))


def test_values() -> None:
    one = stack(0)
    two = one.clone()
    two[0] = two[0] // 16 * 16 + 8
    psnr, ssim = paired_psnr(two, one), paired_ssim(two, one)
    error = np.mean((two[0].double() - one[0].double()).numpy() ** 2)
    assert psnr.values[0] == pytest.approx(10 * np.log10(255**2 / error))
    assert psnr.values[1:] == (100.0, 100.0, 100.0)
    assert psnr.worst == psnr.values[0]
    expected = structural_similarity_index_measure(two.float(), one.float(), data_range=255.0)
    assert ssim.mean == pytest.approx(float(expected), abs=1e-6)
    assert ssim.values[1] == pytest.approx(1)


def test_cosine() -> None:
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert paired_cosine(x, 2 * x).values == pytest.approx((1, 1, 1))
    assert paired_cosine(x, -x).mean == pytest.approx(-1)
    with pytest.raises(DQError, match="differ"):
        paired_cosine(x, x[:2])


def test_mean_and_spread() -> None:
    found = Paired((1.0, 2.0, 6.0))
    assert (found.mean, found.worst) == (3, 1)
    assert found.spread == pytest.approx(np.std([1, 2, 6], ddof=1))
    assert Paired((1.0,)).spread == 0


@pytest.mark.parametrize("metric", [paired_psnr, paired_ssim])
def test_mistakes(metric) -> None:
    with pytest.raises(DQError, match="4 images cannot be paired with 3"):
        metric(stack(0), stack(0)[:3])
    with pytest.raises(DQError, match="16 x 16 and 8 x 8 pixels"):
        metric(stack(0), stack(0, size=8))
    with pytest.raises(DQError, match=r"image 1 has size \(8, 8\), the first \(16, 16\)"):
        metric(pictures(stack(0, 1)) + pictures(stack(0, 1, 8)), pictures(stack(0, 2)))
    with pytest.raises(DQError, match="uint8, not float32"):
        metric(stack(0) / 255, stack(0))


def test_lpips_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for call in (lambda: paired_lpips(stack(0), stack(0)), lambda: check_metrics(["lpips"])):
        with pytest.raises(DQError, match="pip install lpips"):
            call()
