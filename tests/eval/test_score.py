from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dq import checkpoints
from dq.errors import DQError
from dq.eval.clip import Clip
from dq.eval.features import extractors, of_module
from dq.eval.reference import Reference
from dq.eval.score import METRICS, Side, score
from tests.eval.test_features import Means

PROMPTS = [f"picture {i}" for i in range(12)]


def side(folder: Path, name: str, noise: int) -> Side:
    """Smooth pictures with some noise, and latents."""
    generator = np.random.default_rng(0)
    base = generator.integers(30, 220, (12, 4, 4, 3)).repeat(8, 1).repeat(8, 2)
    grain = np.random.default_rng(1).integers(-noise, noise + 1, base.shape)
    (folder / name).mkdir()
    files = []
    for index, array in enumerate((base + grain).clip(0, 255).astype(np.uint8)):
        files.append(folder / name / f"{index}.png")
        Image.fromarray(array).save(files[-1])
    latents = torch.from_numpy(base + grain).float()
    return Side(name, files, PROMPTS, latents, latents.flatten())


@pytest.fixture
def sides(tmp_path: Path) -> list[Side]:
    return [side(tmp_path, name, noise) for name, noise in (("full", 0), ("some", 4), ("much", 40))]


@pytest.fixture(scope="module")
def extractor():
    return extractors["emoji-clip"](None, "clean", "cpu")


@pytest.fixture(scope="module")
def clip() -> Clip:
    return Clip.load(str(checkpoints.path("emoji-clip")))


def test_all_metrics_see_more_noise(sides: list[Side], extractor, clip: Clip) -> None:
    full, some, much = sides
    names = [name for name in METRICS if name != "lpips"]
    near, far = (score(each, full, names, extractor, clip) for each in (some, much))
    assert set(near.metrics) == set(names)
    for name in ("psnr", "ssim", "cosine", "sqnr"):
        assert near.metrics[name] > far.metrics[name]
    for name in ("fid", "kid", "cmmd"):
        assert near.metrics[name] < far.metrics[name]
    assert set(near.baseline) == {"clip"}
    assert all(len(values) == 12 for values in near.images.values())
    assert set(near.images) == {"psnr", "ssim", "cosine", "clip"}
    assert near.spread["kid"] > 0
    worst = far.worst(3)
    assert [far.images["psnr"][i] for i in worst] == sorted(far.images["psnr"])[:3]


def test_a_side_against_itself(sides: list[Side], extractor, clip: Clip) -> None:
    found = score(sides[0], sides[0], (*METRICS[:3], "sqnr", "clip", "fid", "kid"), extractor, clip)
    assert found.metrics["psnr"] == 100
    assert found.metrics["sqnr"] == 200
    assert found.metrics["ssim"] == pytest.approx(1, abs=1e-4)
    assert found.metrics["fid"] == pytest.approx(0, abs=1e-3)
    assert found.metrics["kid"] == pytest.approx(0, abs=1e-6)
    assert found.metrics["clip"] == pytest.approx(found.baseline["clip"])


def test_a_reference_is_scored_on_both_sides(sides: list[Side], extractor) -> None:
    full, some, much = sides
    reference = Reference.of_files("much", list(much.files), extractor, skip_bad=False)
    found = score(some, full, ["fid", "kid", "precision", "recall"], extractor, None, reference)
    names = {"fid", "kid", "precision", "recall"}
    assert set(found.metrics) == names | {f"{name}-reference" for name in names}
    assert set(found.baseline) == {f"{name}-reference" for name in names}
    itself = score(much, full, ["fid"], extractor, None, reference)
    assert itself.metrics["fid-reference"] == pytest.approx(0, abs=1e-3)


def test_fid_alone_of_many_images_keeps_no_features(sides: list[Side], tmp_path: Path) -> None:
    full, some, _ = sides
    small = of_module(Means(), edge=8)  # fewer dimensions than images
    alone = score(some, full, ["fid"], small, None)
    together = score(some, full, ["fid", "kid"], small, None)
    assert alone.metrics["fid"] == pytest.approx(together.metrics["fid"], rel=1e-6)
    reference = Reference.of_files("full", list(full.files), small, skip_bad=False)
    found = score(some, full, ["fid"], small, None, reference)
    assert found.metrics["fid-reference"] == pytest.approx(found.metrics["fid"], rel=1e-6)


def test_mistakes(sides: list[Side]) -> None:
    full, some, _ = sides
    with pytest.raises(DQError, match="unknown metric 'pnsr'"):
        score(some, full, ["pnsr"], None, None)
    other = Side("other", some.files, PROMPTS[::-1])
    with pytest.raises(DQError, match="other and full were drawn for different prompts"):
        score(other, full, ["psnr"], None, None)
