"""`dq eval`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dq.cli.options import (
    AsJson,
    Device,
    Dtype,
    Guidance,
    Prompts,
    Seed,
    Size,
    Steps,
    dtype_of,
    extents,
    lines,
    print_json,
    words,
)

__all__ = ["evaluate"]


def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="quantized checkpoints, or recipes to quantize --against by")
    ],
    against: Annotated[str, typer.Option(help="the full-precision checkpoint")],
    count: Annotated[int, typer.Option("-n", help="images on each side")] = 64,
    prompts: Prompts = None,
    metrics: Annotated[
        str,
        typer.Option(
            help="comma-separated: psnr ssim cosine lpips sqnr clip fid kid cmmd precision recall"
        ),
    ] = "psnr,ssim,cosine,clip,fid,kid",
    features: Annotated[
        str, typer.Option(help="what distances are measured by: inception, clip or emoji-clip")
    ] = "emoji-clip",
    weights: Annotated[
        Path | None, typer.Option(help="weights of the extractor: a file, for clip a folder")
    ] = None,
    resize: Annotated[str, typer.Option(help="clean, legacy_pytorch or adm")] = "clean",
    clip: Annotated[
        str | None, typer.Option(help="CLIP model for the score; the embedded one by default")
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="folder, .npz or pipeline to compare both sides with"),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to draw into")] = Path(
        "dq-eval"
    ),
    most: Annotated[
        list[str] | None, typer.Option("--max", help="fail above, e.g. fid=1.5; may repeat")
    ] = None,
    least: Annotated[
        list[str] | None, typer.Option("--min", help="fail below, e.g. psnr=25; may repeat")
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option("--max-drop", help="fail if so much below full precision, e.g. clip=0.5"),
    ] = None,
    steps: Steps = 25,
    guidance: Guidance = None,
    batch: Annotated[int, typer.Option(help="images drawn together")] = 8,
    seed: Seed = 0,
    size: Size = None,
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="leave out images of --reference that are damaged")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Score quantized pipelines against full precision: same prompts, same seeds.

    Drawing continues where it stopped; `accelerate launch -m dq eval ...` shares it between
    processes. Exit code 1 if a threshold is missed.
    """
    from dq.eval.gate import gates
    from dq.pipelines.gallery import Settings
    from dq.scoring import Asked, run

    thresholds = gates(most or (), least or (), drop or ())
    asked = Asked(
        words(metrics), features, weights,
        resize, clip, reference, dtype_of(dtype), device, skip_bad,
    )  # fmt: skip
    settings = Settings((), seed, steps, guidance, batch, extents(size))
    report = run(models, against, output, asked, count, settings, lines(prompts))
    if report is None:  # another process reports
        return
    failures = report.failures(thresholds)
    if as_json:
        print_json({**report.to_dict(), "failures": failures})
    else:
        print(report)
    for line in failures:
        print(f"failed: {line}", file=sys.stderr)
    if failures:
        raise typer.Exit(1)
