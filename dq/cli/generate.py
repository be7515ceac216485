"""`dq generate`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from dq.cli.options import (
    AsJson,
    Device,
    Dtype,
    Guidance,
    Model,
    Overwrite,
    Prompts,
    Seed,
    Size,
    Steps,
    dtype_of,
    extents,
    lines,
    placed,
    print_json,
)
from dq.errors import DQError

__all__ = ["generate"]


def generate(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="image, or folder for several")],
    prompt: Annotated[
        list[str] | None, typer.Option(help="prompt or class name; may repeat")
    ] = None,
    prompts: Prompts = None,
    steps: Steps = 25,
    guidance: Guidance = None,
    batch: Annotated[int, typer.Option(help="images drawn at a time")] = 8,
    seed: Seed = 0,
    size: Size = None,
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Draw images with a pipeline, quantized or not."""
    from dq.folders import IMAGE_SUFFIXES, check_free, new_folder
    from dq.pipelines.draw import draw
    from dq.pipelines.loading import resolve
    from dq.pipelines.pipeline import DQPipeline

    wanted = [*(prompt or ()), *(lines(prompts) or ())]
    if not wanted:
        raise DQError("nothing to draw: say --prompt TEXT or --prompts FILE")
    check_free(output, overwrite, resolve(model))
    if output.suffix and output.suffix.lower() not in IMAGE_SUFFIXES:
        raise DQError(f"{output} is no image: {', '.join(IMAGE_SUFFIXES)}, or a folder without end")
    if output.suffix and len(wanted) > 1:
        raise DQError(f"{len(wanted)} images do not fit the file {output}; name a folder")
    pipe = DQPipeline.from_pretrained(model, dtype=dtype_of(dtype), **placed(device))
    start = time.perf_counter()
    seeds = range(seed, seed + len(wanted))
    images = draw(pipe, wanted, seeds, steps, guidance, batch, size=extents(size))
    seconds = time.perf_counter() - start
    if output.suffix:
        output.parent.mkdir(parents=True, exist_ok=True)
        images[0].save(output)
        files = [output]
    else:
        with new_folder(output, overwrite) as folder:
            for index, image in enumerate(images):
                image.save(folder / f"{index:05d}.png")
        files = [output / f"{index:05d}.png" for index in range(len(images))]
    if as_json:
        print_json({"files": [str(f) for f in files], "seconds": seconds})
    else:
        print(
            f"{len(files)} images in {seconds:.1f} s: {files[0]}{' ...' if len(files) > 1 else ''}"
        )
