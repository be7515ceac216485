"""`dq quantize`."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Annotated

import typer

from dq.cli.options import (
    AsJson,
    CalibrationImages,
    CalibrationSeed,
    CalibrationSteps,
    Device,
    Dtype,
    ImageFolder,
    Model,
    Overwrite,
    Prompts,
    Size,
    calibration,
    dtype_of,
    placed,
    print_json,
)

__all__ = ["quantize"]


def quantize(
    model: Model,
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="name or .yaml file; see dq recipes")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to write")],
    prompts: Prompts = None,
    images: CalibrationImages = None,
    steps: CalibrationSteps = None,
    seed: CalibrationSeed = None,
    image_folder: ImageFolder = None,
    size: Size = None,
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
    component: Annotated[str | None, typer.Option(help="denoiser, if there are several")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a pipeline and write it as an ordinary diffusers folder.

    An interrupted run continues where it was when the same command is given again.
    """
    from dataclasses import replace

    from dq.folders import check_free, new_folder
    from dq.memory import peak_resident
    from dq.pipelines.loading import resolve
    from dq.pipelines.pipeline import DQPipeline
    from dq.recipe import Recipe

    check_free(output, overwrite, resolve(model))
    wanted = Recipe.get(recipe)
    spec = calibration(prompts, images, steps, seed, image_folder, size, wanted.calibration)
    wanted = replace(wanted, calibration=spec)
    work = output.with_name(f".{output.name}.work")
    start = time.perf_counter()
    pipe = DQPipeline.from_pretrained(
        model, wanted, component=component, work_dir=work, dtype=dtype_of(dtype), **placed(device)
    )
    with new_folder(output, overwrite) as folder:
        pipe.save_pretrained(folder)
    shutil.rmtree(work, ignore_errors=True)
    seconds, peak = time.perf_counter() - start, peak_resident()
    if as_json:
        count = pipe.footprint()
        print_json(
            {
                "output": str(output),
                "recipe": wanted.to_dict(),
                "seconds": seconds,
                "peak_bytes": peak,
                **count.to_dict(),
            }
        )
    else:
        memory = "" if peak is None else f", {peak / 1e9:.1f} GB of memory at the peak"
        print(f"{pipe.summary()}\nwritten to {output} in {seconds:.0f} s{memory}")
