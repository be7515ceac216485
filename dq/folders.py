"""Folders: outputs that appear whole or not at all, images, and where caches are."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dq.errors import DQError

__all__ = ["IMAGE_SUFFIXES", "cache_folder", "check_free", "images_below", "new_folder"]

_WRITTEN = ("model_index.json", "report.html", "sensitivity.json")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def images_below(folder: Path) -> list[Path]:
    """Return the images of a folder and of those below it, sorted by name."""
    return sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)


def cache_folder() -> Path:
    """Return the folder for what can be made again: `$XDG_CACHE_HOME/dq`, or `~/.cache/dq`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dq"


def check_free(target: Path, overwrite: bool, source: str | os.PathLike[str] = "") -> None:
    """Refuse a target that exists, before any work is done for it.

    Args:
        target: What is to be written.
        overwrite: Whether it may exist: a file, a folder that dq writes, a pipeline.
        source: What is read for it.

    Raises:
        DQError: If `target` exists and must not be overwritten, or never may be: it is the source,
            holds it or lies in it, or has files that nothing here writes.
    """
    if target.name in ("", ".."):
        raise DQError(f"{target} is no name for an output; choose one in it")
    if not target.exists():
        return
    if not overwrite:
        raise DQError(f"{target} exists already; choose another name, or say --overwrite")
    own, read = target.resolve(), Path(source).resolve()
    if source and read.exists() and (own in (read, *read.parents) or read in own.parents):
        raise DQError(f"{target} cannot be overwritten: {source} is read; choose another name")
    if target.is_dir() and not _replaceable(target):
        raise DQError(
            f"{target} is not overwritten: it is no folder that dq has written; choose another "
            "name, or delete it first"
        )


def _replaceable(folder: Path) -> bool:
    """Whether a folder is a pipeline, a report, only images, or empty."""
    files = [*folder.iterdir()]
    known = any(file.name in _WRITTEN for file in files)
    return known or all(file.suffix in IMAGE_SUFFIXES for file in files)


@contextmanager
def new_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; rename it to `target` when all went well.

    A folder that was there before is removed only after the new one stands in its place; a killed
    run leaves it as it was.

    Args:
        target: The folder to make.
        overwrite: Whether it may exist.

    Raises:
        DQError: If it exists, or if the disk is full.
    """
    check_free(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        _exchange(partial, target)
    except Exception as error:
        if _is_full(error):
            raise DQError(
                f"no space left on the disk of {target.parent}: free some, or choose another "
                "place; nothing was changed"
            ) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _exchange(partial: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        target.rename(old)
    partial.rename(target)
    if old.is_dir():
        shutil.rmtree(old)
    elif old.exists():
        old.unlink()


def _is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that the disk is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):  # safetensors raises its own class
            return True
        error = error.__cause__ or error.__context__
    return False
