"""`dq inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from dq.cli.options import AsJson, Device, Dtype, Model, dtype_of, print_json

__all__ = ["inspect"]


def inspect(
    model: Model,
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
    theoretical: Annotated[
        bool, typer.Option("--theoretical", help="count multiply-adds and bit operations too")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show size, average bits, and for each layer what is stored and what really computes."""
    from dq.pipelines.inspection import inspect_folder

    report = inspect_folder(model, dtype_of(dtype), device, theoretical)
    if as_json:
        print_json(report.to_dict())
    else:
        print(report)
