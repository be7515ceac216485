"""`dq bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dq.cli.options import AsJson, Device, Seed, numbers, print_json
from dq.errors import DQError

__all__ = ["bench"]


def bench(
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="unet, dit, or any pipeline; may repeat"),
    ] = None,
    recipe: Annotated[list[str] | None, typer.Option("--recipe", "-r", help="may repeat")] = None,
    threads: Annotated[int, typer.Option(help="threads of the CPU")] = 1,
    repeats: Annotated[int, typer.Option(help="rounds; medians are reported")] = 15,
    batch: Annotated[int, typer.Option(help="images a forward")] = 2,
    seed: Seed = 0,
    device: Device = "cpu",
    compiled: Annotated[
        bool, typer.Option("--compile", help="measure bf16 and recipes compiled as well; minutes")
    ] = False,
    peer: Annotated[
        list[str] | None,
        typer.Option("--peer", help="a quantizer to compare with, or all; may repeat"),
    ] = None,
    whole: Annotated[
        int, typer.Option("--steps", help="measure whole pipelines of so many steps instead")
    ] = 0,
    attention: Annotated[
        int, typer.Option(help="measure block-sparse attention of so many tokens instead")
    ] = 0,
    heads: Annotated[int, typer.Option(help="of that attention")] = 8,
    depth: Annotated[int, typer.Option(help="features of a head")] = 64,
    densities: Annotated[str, typer.Option(help="shares of its blocks")] = "0.5,0.3,0.2",
    way: Annotated[
        list[str] | None, typer.Option(help="to compute it, such as flex; may repeat")
    ] = None,
    profile: Annotated[bool, typer.Option(help="print the time of each operator")] = False,
    plot: Annotated[Path | None, typer.Option(help="picture to draw, e.g. bench.png")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file to write")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time denoisers, quantized and not, in turn in one process.

    Without --model: a UNet of 51 M and a DiT of 85 M parameters with random weights.
    """
    for file in (output, plot):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
    if attention:
        from dq.bench.attention import run as run_attention

        if plot is not None or profile:
            raise DQError("--attention takes no --plot and no --profile: those are of denoisers")
        shares = numbers(densities)
        shape = attention, heads, depth, batch
        found = run_attention(*shape, shares, 64, threads, repeats, device, way or ())
        if output is not None:
            found.save(output)
        print_json(found.to_dict()) if as_json else print(found)
        return
    from dq.bench import MODELS, RECIPES, run
    from dq.bench.plot import plot as draw

    report = run(
        model or MODELS, recipe or RECIPES, threads, repeats, batch, seed, device, compiled,
        peer or (), whole,
    )  # fmt: skip
    if output is not None:
        report.save(output)
    if plot is not None:
        draw(report, plot)
    if as_json:
        print_json(report.to_dict())
        return
    print(report)
    if profile:
        print("", report.profile(), sep="\n")
