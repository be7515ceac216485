"""What several commands take, and what becomes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dq.errors import DQError, unknown

if TYPE_CHECKING:
    from dq.calibrate import CalibrationSpec

__all__ = [
    "AsJson", "CalibrationImages", "CalibrationSeed", "CalibrationSteps",
    "Device", "Dtype", "Guidance", "ImageFolder", "Model", "Overwrite", "Prompts",
    "Seed", "Size", "Steps",
    "calibration", "dtype_of", "extents", "lines", "numbers", "placed", "print_json", "words",
]  # fmt: skip

_DTYPES = ("float32", "bfloat16", "float16")

Model = Annotated[str, typer.Argument(help="folder, hub name, emoji-unet or emoji-dit")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
Seed = Annotated[int, typer.Option(help="seed of the first image; image i has seed + i")]
Dtype = Annotated[str, typer.Option(help=f"of everything that is not packed: {', '.join(_DTYPES)}")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Guidance = Annotated[float | None, typer.Option(help="guidance scale; default: the pipeline's")]
Steps = Annotated[int, typer.Option(help="denoising steps")]
Prompts = Annotated[Path | None, typer.Option(help="text file, one prompt or class name a line")]
CalibrationImages = Annotated[int | None, typer.Option(help="calibration images")]
CalibrationSteps = Annotated[int | None, typer.Option(help="calibration steps an image")]
CalibrationSeed = Annotated[int | None, typer.Option(help="calibration seed")]
Size = Annotated[
    str | None, typer.Option(help="HEIGHTxWIDTH, of videos FRAMESxHEIGHTxWIDTH, if not the model's")
]
ImageFolder = Annotated[
    Path | None, typer.Option(help="images to calibrate on, captions beside them or as names")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an output that exists")]


def lines(path: Path | None) -> tuple[str, ...] | None:
    """Return the lines of a file of prompts that are not empty; None for none.

    Raises:
        DQError: If it is missing, or has none.
    """
    if path is None:
        return None
    if not path.is_file():
        raise DQError(f"prompt file {path} does not exist")
    found = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    if not found:
        raise DQError(f"prompt file {path} is empty; write one prompt a line")
    return found


def calibration(
    prompts: Path | None,
    images: int | None,
    steps: int | None,
    seed: int | None,
    folder: Path | None,
    size: str | None = None,
    default: CalibrationSpec | None = None,
) -> CalibrationSpec:
    """Return the default calibration with what was given on the command line."""
    from dataclasses import replace

    from dq.calibrate import CalibrationSpec

    given: dict[str, Any] = {"n": images, "steps": steps, "seed": seed, "prompts": lines(prompts)}
    given["folder"] = None if folder is None else str(folder)
    given["size"] = extents(size) or None
    changes = {key: value for key, value in given.items() if value is not None}
    return replace(default or CalibrationSpec(), **changes)


def extents(size: str | None) -> tuple[int, ...]:
    """Return the numbers of a size such as 512x768; none for None.

    Raises:
        DQError: If it is not of that form.
    """
    if size is None:
        return ()
    found = tuple(int(part) for part in size.split("x") if part.isdecimal())
    if len(found) != size.count("x") + 1 or len(found) not in (2, 3):
        raise DQError(f"a size is HEIGHTxWIDTH or FRAMESxHEIGHTxWIDTH, not {size!r}")
    return found


def words(text: str) -> tuple[str, ...]:
    """Split at commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def numbers(text: str) -> list[float]:
    """Split numbers at commas.

    Raises:
        DQError: If one is none.
    """
    try:
        return [float(word) for word in words(text)]
    except ValueError as error:
        raise DQError(f"numbers separated by commas are wanted, not {text!r}") from error


def dtype_of(name: str) -> Any:
    """Return torch's dtype of a name.

    Raises:
        DQError: For another one.
    """
    import torch

    if name not in _DTYPES:
        raise unknown("dtype", name, _DTYPES)
    return getattr(torch, name)


def placed(device: str) -> dict[str, str]:
    """Return what `from_pretrained` takes to load onto a device.

    Raises:
        DQError: If there is no such device.
    """
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise DQError(f"--device {device}: torch finds no such device here; leave it out for cpu")
    return {} if device == "cpu" else {"device_map": device}


def print_json(values: Any) -> None:
    """Print values as JSON."""
    print(json.dumps(values, indent=2))
