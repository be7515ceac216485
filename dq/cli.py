"""The `dq` command."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dq.errors import DQError, unknown

if TYPE_CHECKING:
    from dq.calibrate import CalibrationSpec

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Quantize diffusion pipelines: really packed, honestly measured.",
)

_DTYPES = ("float32", "bfloat16", "float16")

Model = Annotated[str, typer.Argument(help="folder, hub name, emoji-unet or emoji-dit")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
Seed = Annotated[int, typer.Option(help="seed of the first image; image i has seed + i")]
Dtype = Annotated[str, typer.Option(help=f"of everything that is not packed: {', '.join(_DTYPES)}")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Guidance = Annotated[float | None, typer.Option(help="guidance scale; default: the pipeline's")]
Steps = Annotated[int, typer.Option(help="denoising steps")]
Prompts = Annotated[Path | None, typer.Option(help="text file, one prompt or class name a line")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an output that exists")]


def main() -> None:
    """Run the command line; errors that a user can mend are one line and exit code 2."""
    # Before the libraries are imported: their advice is for programmers.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    try:
        app()
    except DQError as error:
        print(f"dq: {error}", file=sys.stderr)
        raise SystemExit(2) from None


@app.callback()
def _prepare() -> None:
    """Keep the loaders' progress bars off logs and pipes; ours are there for what takes long."""
    if not sys.stderr.isatty():
        import diffusers.utils.logging
        import transformers.utils.logging

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()


@app.command()
def quantize(
    model: Model,
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="name or .yaml file; see dq recipes")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to write")],
    prompts: Prompts = None,
    images: Annotated[int | None, typer.Option(help="calibration images")] = None,
    steps: Annotated[int | None, typer.Option(help="calibration steps an image")] = None,
    seed: Annotated[int | None, typer.Option(help="calibration seed")] = None,
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
    from dq.pipelines.pipeline import DQPipeline
    from dq.recipe import Recipe

    check_free(output, overwrite)
    wanted = Recipe.get(recipe)
    spec = _calibration(prompts, images, steps, seed, wanted.calibration)
    wanted = replace(wanted, calibration=spec)
    work = output.with_name(f".{output.name}.work")
    start = time.perf_counter()
    pipe = DQPipeline.from_pretrained(
        model, wanted, component=component, work_dir=work, dtype=_dtype(dtype), **_placed(device)
    )
    with new_folder(output, overwrite) as folder:
        pipe.save_pretrained(folder)
    _remove(work)
    seconds, peak = time.perf_counter() - start, peak_resident()
    if as_json:
        count = pipe.footprint()
        _print_json(
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


@app.command()
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
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Draw images with a pipeline, quantized or not."""
    from dq.folders import check_free, new_folder
    from dq.pipelines.draw import draw
    from dq.pipelines.pipeline import DQPipeline

    wanted = [*(prompt or ()), *(_lines(prompts) or ())]
    if not wanted:
        raise DQError("nothing to draw: say --prompt TEXT or --prompts FILE")
    check_free(output, overwrite)
    pipe = DQPipeline.from_pretrained(model, dtype=_dtype(dtype), **_placed(device))
    start = time.perf_counter()
    seeds = range(seed, seed + len(wanted))
    images = draw(pipe, wanted, seeds, steps, guidance, batch)
    seconds = time.perf_counter() - start
    if output.suffix:
        if len(images) > 1:
            raise DQError(f"{len(images)} images do not fit the file {output}; name a folder")
        output.parent.mkdir(parents=True, exist_ok=True)
        images[0].save(output)
        files = [output]
    else:
        with new_folder(output, overwrite) as folder:
            for index, image in enumerate(images):
                image.save(folder / f"{index:05d}.png")
        files = [output / f"{index:05d}.png" for index in range(len(images))]
    if as_json:
        _print_json({"files": [str(f) for f in files], "seconds": seconds})
    else:
        print(
            f"{len(files)} images in {seconds:.1f} s: {files[0]}{' ...' if len(files) > 1 else ''}"
        )


@app.command()
def inspect(
    model: Model, dtype: Dtype = "bfloat16", device: Device = "cpu", as_json: AsJson = False
) -> None:
    """Show size, average bits, and for each layer what is stored and what really computes."""
    from dq.pipelines.inspection import inspect_folder

    report = inspect_folder(model, _dtype(dtype), device)
    if as_json:
        _print_json(report.to_dict())
    else:
        print(report)


@app.command()
def export(
    model: Model,
    to: Annotated[str, typer.Option("--to", help="layout: bfl, modelopt, torchao or mx")],
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
    from dq.pipelines.pipeline import load_denoiser, resolve

    source = Path(resolve(model))
    check(source, to, output, overwrite)
    name, denoiser = load_denoiser(str(source), component, dtype=_dtype(dtype))
    report = run(denoiser, source, name, to, output, overwrite)
    if as_json:
        _print_json(report.to_dict())
    else:
        print(report)


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the recipes."""
    from dq.recipe import templates

    if as_json:
        _print_json({name: template.help for name, template in templates.items()})
        return
    width = max(len(name) for name in templates.names())
    for name, template in templates.items():
        print(f"{name:{width}}  {template.help}")


@app.command()
def sensitivity(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to write")],
    prompts: Prompts = None,
    images: Annotated[int | None, typer.Option(help="calibration images")] = None,
    steps: Annotated[int | None, typer.Option(help="calibration steps an image")] = None,
    seed: Annotated[int | None, typer.Option(help="calibration seed")] = None,
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

    method = MixDQ(weights=_words(weights), inputs=_words(inputs), float_share=float_share)
    runs = _words(run_weights), _words(run_inputs)
    part, content = 0.0 if fast else share, "ssim" if ssim else "noise"
    settings = Settings(*runs, part, batches, calls, content, prefix=not no_prefix)
    spec = _calibration(prompts, images, steps, seed)
    asked = Asked(method, settings, tuple(_numbers(bits)), check)
    report = run(model, output, asked, spec, _dtype(dtype), device, overwrite)
    if report is None:  # another process reports
        return
    if as_json:
        _print_json(report.to_dict())
    else:
        print(report)


@app.command()
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
        _print_json(report.to_dict())
        return
    print(report)
    if profile:
        print("", report.profile(), sep="\n")


@app.command()
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
        _print_json(found.to_dict())
    else:
        print(f"{file}\n{found.summary()}")


@app.command("eval")
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
        tuple(name.strip() for name in metrics.split(",") if name.strip()), features, weights,
        resize, clip, reference, _dtype(dtype), device, skip_bad,
    )  # fmt: skip
    settings = Settings((), seed, steps, guidance, batch)
    report = run(models, against, output, asked, count, settings, _lines(prompts))
    if report is None:  # another process reports
        return
    failures = report.failures(thresholds)
    if as_json:
        _print_json({**report.to_dict(), "failures": failures})
    else:
        print(report)
    for line in failures:
        print(f"failed: {line}", file=sys.stderr)
    if failures:
        raise typer.Exit(1)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to write")] = Path(
        "dq-demo"
    ),
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="what to show")] = "w4a8",
    model: Annotated[
        str, typer.Option(help="emoji-unet, emoji-dit, or any pipeline")
    ] = "emoji-unet",
    images: Annotated[int, typer.Option(help="images drawn on each side")] = 8,
    steps: Steps = 25,
    guidance: Guidance = None,
    seed: Seed = 0,
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Quantize, save, reload and draw with the checkpoint inside the package, offline."""
    from dq.demo import Settings, run

    settings = Settings(images, steps, guidance, seed, _dtype(dtype), device)
    result = run(model, recipe, output, settings)
    if as_json:
        _print_json(result.to_dict())
    else:
        print(result)


def _lines(path: Path | None) -> tuple[str, ...] | None:
    if path is None:
        return None
    if not path.is_file():
        raise DQError(f"prompt file {path} does not exist")
    lines = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    if not lines:
        raise DQError(f"prompt file {path} is empty; write one prompt a line")
    return lines


def _calibration(
    prompts: Path | None,
    images: int | None,
    steps: int | None,
    seed: int | None,
    default: CalibrationSpec | None = None,
) -> CalibrationSpec:
    from dataclasses import replace

    from dq.calibrate import CalibrationSpec

    given = {"n": images, "steps": steps, "seed": seed, "prompts": _lines(prompts)}
    changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    return replace(default or CalibrationSpec(), **changes)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in _words(text)]
    except ValueError as error:
        raise DQError(f"numbers separated by commas are wanted, not {text!r}") from error


def _dtype(name: str) -> Any:
    import torch

    if name not in _DTYPES:
        raise unknown("dtype", name, _DTYPES)
    return getattr(torch, name)


def _placed(device: str) -> dict[str, str]:
    return {} if device == "cpu" else {"device_map": device}


def _print_json(values: Any) -> None:
    print(json.dumps(values, indent=2))


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
