"""`python -m dq.checkpoints.train`: makes the checkpoints of this package, part by part."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline

from dq import checkpoints
from dq.checkpoints.train import data, grid
from dq.checkpoints.train.export import export, pipeline
from dq.checkpoints.train.loop import Run
from dq.checkpoints.train.parts import PLANS, Work, exported


def main(arguments: list[str] | None = None) -> None:
    """Run one command; see `--help`.

    Args:
        arguments: The command line, `sys.argv[1:]` by default.
    """
    options = _parser().parse_args(arguments)
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    work = Work(options.cache, options.device)
    if options.command == "data":
        art = work.art
        print(f"{len(art.emoji)} pictures in {data.fetch(options.cache / 'emoji')}")
    elif options.command == "export":
        export(work, options.target)
    elif options.command == "grid":
        _grid(work, options)
    else:
        _train(work, options)


def _parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    common = argparse.ArgumentParser(add_help=False)
    home = Path.home() / ".cache/dq"
    common.add_argument("--cache", type=Path, default=home, help="artwork and training states")
    common.add_argument("--device", default="cpu", help="where to compute, such as cuda")
    common.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser = argparse.ArgumentParser(prog="python -m dq.checkpoints.train", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("data", parents=[common], help="download and unpack the artwork")
    for part, plan in PLANS.items():
        sub = commands.add_parser(part, parents=[common], help=f"train the {part}, or continue")
        for field in ("steps", "batch", "decay", "warmup", "seed"):
            sub.add_argument(f"--{field}", type=int, default=getattr(plan, field))
        for field in ("lr", "ema", "save_minutes"):
            flag = f"--{field.replace('_', '-')}"
            sub.add_argument(flag, type=float, default=getattr(plan, field))
        start = sub.add_mutually_exclusive_group()
        start.add_argument("--from-stable", action="store_true", help="state before the decay")
        start.add_argument("--from-export", action="store_true", help="weights of the package")
        start.add_argument("--restart", action="store_true", help="ignore what was trained")
    sub = commands.add_parser("export", parents=[common], help="write the checkpoints")
    sub.add_argument("--target", type=Path, default=Path(checkpoints.__file__).parent)
    sub = commands.add_parser("grid", parents=[common], help="draw 24 prompts")
    sub.add_argument("part", choices=("unet", "dit"))
    sub.add_argument("file", type=Path, help="the PNG to write")
    sub.add_argument("--exported", action="store_true", help="what the package holds")
    sub.add_argument("--steps", type=int, default=25)
    sub.add_argument("--cfg", type=float, default=3.0, help="guidance scale")
    return parser


def _train(work: Work, options: argparse.Namespace) -> None:
    """Start or continue the training of one part."""
    part = options.command
    fields = ("steps", "batch", "decay", "warmup", "seed", "lr", "ema", "save_minutes")
    plan = replace(PLANS[part], **{name: getattr(options, name) for name in fields})
    torch.manual_seed(plan.seed)
    trainee = work.trainee(part, plan.batch)
    if options.from_export:
        trainee.model.load_state_dict(exported(part))
    run = Run(trainee, plan, work.folder(part))
    if options.from_stable:
        run.load("stable.pt")
    elif (run.folder / "state.pt").exists() and not (options.restart or options.from_export):
        run.load()
    run.train()


def _grid(work: Work, options: argparse.Namespace) -> None:
    """Draw the 24 prompts and say what the CLIP model makes of them."""
    if options.exported:
        pipe = DiffusionPipeline.from_pretrained(checkpoints.path(f"emoji-{options.part}"))
    else:
        pipe = pipeline(work, options.part)
    pictures = grid.draw(pipe, steps=options.steps, cfg=options.cfg)
    grid.sheet(pictures, options.file)
    hits, score = grid.rank(work, pictures)
    print(f"{options.file}: CLIP names {hits} of {len(pictures)}, mean CLIP score {score:.1f}")


if __name__ == "__main__":
    main()
