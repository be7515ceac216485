from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dq.errors import DQError
from dq.eval.images import check_images, image_files, read_batches, to_tensor


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images, the last in a folder below."""
    (tmp_path / "more").mkdir()
    for i, name in enumerate(("b.png", "a.png", "c.jpg", "d.webp", "more/e.png")):
        Image.new("RGB", (6, 4), (40 * i, 0, 0)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    return tmp_path


def test_files_are_sorted(folder: Path) -> None:
    names = [f.relative_to(folder).as_posix() for f in image_files(folder)]
    assert names == ["a.png", "b.png", "c.jpg", "d.webp", "more/e.png"]


def test_batches(folder: Path) -> None:
    batches = list(read_batches(image_files(folder), 2))
    assert [len(images) for images, _ in batches] == [2, 2, 1]
    images, files = batches[0]
    assert images.shape == (2, 3, 4, 6)
    assert images.dtype == torch.uint8
    assert int(images[0, 0, 0, 0]) == 40
    assert [f.name for f in files] == ["a.png", "b.png"]


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK"])
def test_other_modes_are_named(folder: Path, mode: str) -> None:
    Image.new(mode, (6, 4)).convert(mode).save(folder / "bb.tiff")
    (folder / "bb.tiff").rename(folder / "bb.png")
    with pytest.raises(DQError, match=rf"bb\.png: mode {mode} instead of RGB.*--skip-bad"):
        list(read_batches(image_files(folder), 2))


def test_palettes_are_a_way_to_store() -> None:
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6)).convert("RGB")
    assert to_tensor(image.convert("P", palette=Image.Palette.ADAPTIVE)).shape == (3, 4, 6)


def test_corrupt_files_are_named_or_skipped(folder: Path) -> None:
    whole = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DQError, match=r"a\.png: .*--skip-bad"):
        list(read_batches(image_files(folder), 8))
    ((images, files),) = read_batches(image_files(folder), 8, skip_bad=True)
    assert len(images) == len(files) == 4


def test_sizes_must_agree(folder: Path) -> None:
    Image.new("RGB", (6, 5)).save(folder / "z.png")
    with pytest.raises(DQError, match=r"z\.png has 6 x 5 pixels, the images before it 6 x 4"):
        list(read_batches(image_files(folder), 8))


def test_too_few(tmp_path: Path) -> None:
    with pytest.raises(DQError, match="holds 0 images"):
        image_files(tmp_path)
    with pytest.raises(DQError, match="is not a folder"):
        image_files(tmp_path / "none")


def test_floats_are_refused() -> None:
    with pytest.raises(DQError, match=r"uint8, not float32 of 0 to 1; for 0 to 1: "):
        check_images(torch.linspace(0, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4))
    with pytest.raises(DQError, match=r"\(N, 3, H, W\), not \(2, 4, 4, 3\)"):
        check_images(torch.zeros(2, 4, 4, 3, dtype=torch.uint8))
