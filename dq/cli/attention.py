"""`dq attention`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dq.cli.options import (
    AsJson,
    Device,
    Dtype,
    Model,
    Overwrite,
    Seed,
    Size,
    dtype_of,
    extents,
    placed,
    print_json,
)

__all__ = ["attention"]


def attention(
    model: Model,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", help="such as paro-50, for a model without ordered tokens"),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="page to write")] = Path(
        "attention.html"
    ),
    heads: Annotated[int, typer.Option(help="heads shown of each attention")] = 3,
    steps: Annotated[int, typer.Option(help="denoising steps of the image")] = 8,
    seed: Seed = 0,
    size: Size = None,
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Show attention maps before and after ordering, and how much of each is computed."""
    from dataclasses import replace

    from dq.folders import check_free
    from dq.pipelines.pipeline import DQPipeline
    from dq.recipe import Recipe
    from dq.views.attention import run

    check_free(output, overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    wanted = None if recipe is None else Recipe.get(recipe)
    if wanted is not None and size is not None:
        spec = replace(wanted.calibration, size=extents(size))
        wanted = replace(wanted, calibration=spec)
    pipe = DQPipeline.from_pretrained(model, wanted, dtype=dtype_of(dtype), **placed(device))
    views = run(pipe, output, heads, steps, seed, extents(size))
    if as_json:
        print_json([view.to_dict() for view in views])
        return
    for view in views:
        print("  ".join(str(value) for value in view.row().values()))
    print(f"page: {output}")
