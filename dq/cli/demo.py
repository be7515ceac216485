"""`dq demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dq.cli.options import AsJson, Device, Dtype, Guidance, Seed, Steps, dtype_of, print_json

__all__ = ["demo"]


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to write")] = Path(
        "dq-demo"
    ),
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="what to show")] = "w4a8",
    model: Annotated[
        str, typer.Option(help="emoji-unet, emoji-dit, or any pipeline")
    ] = "emoji-unet",
    images: Annotated[int, typer.Option(help="images drawn on each side")] = 8,
    steps: Steps = 25,
    guidance: Guidance = None,
    seed: Seed = 0,
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Quantize, save, reload and draw with the checkpoint inside the package, offline."""
    from dq.demo import Settings, run

    settings = Settings(images, steps, guidance, seed, dtype_of(dtype), device)
    result = run(model, recipe, output, settings)
    if as_json:
        print_json(result.to_dict())
    else:
        print(result)
