"""Output folders appear whole or not at all."""

import subprocess
from pathlib import Path

import pytest

from dq.errors import DQError
from dq.folders import check_free, new_folder


def test_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("new")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_existing_folder_is_refused_without_overwrite(tmp_path: Path) -> None:
    with pytest.raises(DQError, match=r"exists already.*--overwrite"):
        check_free(tmp_path, overwrite=False)
    with pytest.raises(DQError, match="exists already"), new_folder(tmp_path):
        raise AssertionError("the block must not run")


@pytest.mark.parametrize("file", ["model_index.json", "report.html", "00000.png"])
def test_overwrite_replaces_everything(tmp_path: Path, file: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / file).write_text("old")
    with new_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_others_wrote_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(DQError, match="no folder that dq has written"):
        check_free(tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("target", ["source", "source/unet", "."])
def test_what_is_read_is_never_overwritten(tmp_path: Path, target: str) -> None:
    (tmp_path / "source/unet").mkdir(parents=True)
    for folder in (".", "source", "source/unet"):
        (tmp_path / folder / "model_index.json").write_text("{}")
    with pytest.raises(DQError, match="is read; choose another name"):
        check_free(tmp_path / target, overwrite=True, source=tmp_path / "source")


def test_a_name_is_needed() -> None:
    with pytest.raises(DQError, match="no name for an output"):
        check_free(Path(), overwrite=True)


def test_failure_leaves_the_old_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    (tmp_path / "out" / "report.html").write_text("old")
    with pytest.raises(RuntimeError, match="boom"), new_folder(tmp_path / "out", overwrite=True):
        raise RuntimeError("boom")
    assert (tmp_path / "out" / "old").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_full_disk_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        (disk / "out").mkdir()
        (disk / "out" / "old").write_text("old")
        (disk / "out" / "report.html").write_text("old")
        with (
            pytest.raises(DQError, match=r"no space left .* nothing was changed"),
            new_folder(disk / "out", overwrite=True) as folder,
        ):
            (folder / "new").write_bytes(bytes(1 << 20))
        assert (disk / "out" / "old").read_text() == "old"
    finally:
        subprocess.run(["umount", str(disk)], check=True)
