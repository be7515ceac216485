"""`dq inspect`."""

from __future__ import annotations

from dq.cli.options import AsJson, Device, Dtype, Model, dtype_of, print_json

__all__ = ["inspect"]


def inspect(
    model: Model, dtype: Dtype = "bfloat16", device: Device = "cpu", as_json: AsJson = False
) -> None:
    """Show size, average bits, and for each layer what is stored and what really computes."""
    from dq.pipelines.inspection import inspect_folder

    report = inspect_folder(model, dtype_of(dtype), device)
    if as_json:
        print_json(report.to_dict())
    else:
        print(report)
