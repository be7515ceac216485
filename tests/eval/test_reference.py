from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dq.errors import DQError
from dq.eval.features import Extractor, of_module
from dq.eval.frechet import frechet_distance_of_features
from dq.eval.reference import Reference, features_of_files


class Patches(nn.Module):
    num_features = 12

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


@pytest.fixture
def extractor() -> Extractor:
    return of_module(Patches(), edge=8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    (tmp_path / "set").mkdir()
    for i in range(30):
        array = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / "set" / f"{i:02}.png")
    return tmp_path / "set"


def test_folder_and_files_of_both_layouts_agree(
    folder: Path, tmp_path: Path, extractor: Extractor
) -> None:
    images = Reference.load(folder, extractor)
    assert images.count == 30
    other = torch.randn(40, 12, generator=torch.Generator().manual_seed(0)) * 30 + 100
    expected = frechet_distance_of_features(other, images.images("fid"))
    images.save(tmp_path / "moments.npz")
    stack = np.stack([np.asarray(Image.open(f)) for f in sorted(folder.iterdir())])
    np.savez(tmp_path / "batch.npz", arr_0=stack)
    assert set(np.load(tmp_path / "moments.npz").files) == {"mu", "sigma"}
    for name in ("moments.npz", "batch.npz"):
        found = Reference.load(tmp_path / name, extractor)
        assert found.fid(other) == pytest.approx(expected, rel=1e-6)
    assert images.fid(other) == pytest.approx(expected, rel=1e-6)
    files = sorted(folder.iterdir())
    assert torch.equal(features_of_files(files, extractor), images.images("kid"))


def test_moments_are_not_enough_for_everything(tmp_path: Path, extractor: Extractor) -> None:
    np.savez(tmp_path / "m.npz", mu=np.zeros(12), sigma=np.eye(12))
    with pytest.raises(DQError, match=r"m\.npz holds moments only; kid needs images"):
        Reference.load(tmp_path / "m.npz", extractor).images("kid")


def test_mistakes(tmp_path: Path, folder: Path, extractor: Extractor) -> None:
    np.savez(tmp_path / "other.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(DQError, match="has 2048 dimensions, features of Patches have 12"):
        Reference.load(tmp_path / "other.npz", extractor)
    np.savez(tmp_path / "empty.npz", x=np.zeros(3))
    with pytest.raises(DQError, match="neither mu and sigma nor arr_0"):
        Reference.load(tmp_path / "empty.npz", extractor)
    with pytest.raises(DQError, match="does not exist"):
        Reference.load(tmp_path / "none.npz", extractor)
    (folder / "05.png").write_bytes(b"not a picture")
    with pytest.raises(DQError, match=r"05\.png: .*--skip-bad"):
        Reference.load(folder, extractor)
    assert Reference.load(folder, extractor, skip_bad=True).count == 29
