"""The small trained checkpoints that come with the package, in the layout of diffusers."""

from __future__ import annotations

from pathlib import Path

from dq.errors import DQError, unknown

__all__ = ["names", "path"]

_NAMES = ("emoji-unet", "emoji-dit", "emoji-clip")


def names() -> tuple[str, ...]:
    """Return the names of the checkpoints.

    `emoji-unet` loads as `StableDiffusionPipeline`, `emoji-dit` as `DiTPipeline` and `emoji-clip`
    as `CLIPModel` with `CLIPTokenizer`.
    """
    return _NAMES


def path(name: str) -> Path:
    """Return the folder of a checkpoint, ready for `from_pretrained`.

    Args:
        name: One of `names()`.

    Raises:
        DQError: There is no checkpoint of this name, or its folder is not installed.
    """
    if name not in _NAMES:
        raise unknown("checkpoint", name, _NAMES)
    folder = Path(__file__).parent / name
    if not folder.is_dir():
        raise DQError(
            f"checkpoint {name!r}: {folder} does not exist. It comes with the package; reinstall "
            "it, or make the checkpoint with `python -m dq.checkpoints.train export`."
        )
    return folder
