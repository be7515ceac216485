"""`dq measure`."""

from __future__ import annotations

from typing import Annotated

import typer

from dq.cli.options import AsJson, print_json

__all__ = ["measure"]


def measure(
    threads: Annotated[int, typer.Option(help="threads of the CPU")] = 1,
    repeats: Annotated[int, typer.Option(help="rounds; medians are kept")] = 9,
    as_json: AsJson = False,
) -> None:
    """Measure what runs fastest at which size on this machine, and keep it for later runs.

    Until then dq goes by the table that it comes with.
    """
    from dq.bench.machine import measure as run

    found = run(threads, repeats)
    file = found.write()
    if as_json:
        print_json(found.to_dict())
    else:
        print(f"{file}\n{found.summary()}")
