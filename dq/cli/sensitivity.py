"""`dq sensitivity`."""

from __future__ import annotations

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
    calibration,
    dtype_of,
    numbers,
    print_json,
    words,
)

__all__ = ["sensitivity"]


def sensitivity(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to write")],
    prompts: Prompts = None,
    images: CalibrationImages = None,
    steps: CalibrationSteps = None,
    seed: CalibrationSeed = None,
    image_folder: ImageFolder = None,
    weights: Annotated[
        str, typer.Option(help="weight formats that compete")
    ] = "int2,int3,int4,int5,int6,int8",
    inputs: Annotated[str, typer.Option(help="input formats that compete; none: ''")] = "int8",
    run_weights: Annotated[
        str, typer.Option(help="weight formats that are measured; the others are estimated")
    ] = "int4",
    run_inputs: Annotated[str, typer.Option(help="input formats that are measured")] = "int8",
    batches: Annotated[int, typer.Option(help="batches of images to measure on")] = 1,
    calls: Annotated[int, typer.Option(help="steps of each, spread over the trajectory")] = 4,
    share: Annotated[
        float, typer.Option(help="share of the layers, the most fragile ones, that are measured")
    ] = 0.25,
    fast: Annotated[
        bool, typer.Option("--fast", help="measure none: all are estimated from gradients")
    ] = False,
    ssim: Annotated[
        bool, typer.Option("--ssim", help="score feed-forward and cross-attention by images too")
    ] = False,
    no_prefix: Annotated[
        bool, typer.Option("--no-prefix", help="run the whole model each time, to compare times")
    ] = False,
    bits: Annotated[
        str, typer.Option(help="budgets to show, average bits a weight")
    ] = "2.5,3,3.5,4,4.5,5,6,8",
    float_share: Annotated[
        float, typer.Option(help="share of multiply-adds that may stay on float inputs")
    ] = 0.01,
    check: Annotated[int, typer.Option(help="random choices to hold predictions against")] = 0,
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Show which layers of a denoiser can spare bits, and what each budget buys.

    Measurements are kept: `dq quantize -r mixdq-w4a8` takes them over, whatever its budget.
    `accelerate launch -m dq sensitivity ...` shares the layers between processes.
    """
    from dq.budgets import Asked, run
    from dq.methods.mixdq import MixDQ
    from dq.sensitivity.survey import Settings

    method = MixDQ(weights=words(weights), inputs=words(inputs), float_share=float_share)
    runs = words(run_weights), words(run_inputs)
    part, content = 0.0 if fast else share, "ssim" if ssim else "noise"
    settings = Settings(*runs, part, batches, calls, content, prefix=not no_prefix)
    spec = calibration(prompts, images, steps, seed, image_folder)
    asked = Asked(method, settings, tuple(numbers(bits)), check)
    report = run(model, output, asked, spec, dtype_of(dtype), device, overwrite)
    if report is None:  # another process reports
        return
    if as_json:
        print_json(report.to_dict())
    else:
        print(report)
