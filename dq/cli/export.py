"""`dq export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dq.cli.options import AsJson, Dtype, Model, Overwrite, dtype_of, print_json

__all__ = ["export"]


def export(
    model: Model,
    to: Annotated[str, typer.Option("--to", help="layout: bfl, gemlite, modelopt, torchao or mx")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to write")],
    dtype: Dtype = "bfloat16",
    component: Annotated[str | None, typer.Option(help="denoiser, if there are several")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint that dq has quantized in the layout of another library.

    Layers that do not fit the layout are written in floating point.
    """
    from dq.export import check
    from dq.export import export as run
    from dq.pipelines.loading import load_denoiser, resolve

    source = Path(resolve(model))
    check(source, to, output, overwrite)
    name, denoiser = load_denoiser(str(source), component, dtype=dtype_of(dtype))
    report = run(denoiser, source, name, to, output, overwrite)
    if as_json:
        print_json(report.to_dict())
    else:
        print(report)
