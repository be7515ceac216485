"""The `dq` command: a file a subcommand, in `options` what they share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import typer

from dq.cli.attention import attention
from dq.cli.bench import bench
from dq.cli.demo import demo
from dq.cli.evaluate import evaluate
from dq.cli.export import export
from dq.cli.generate import generate
from dq.cli.inspect import inspect
from dq.cli.measure import measure
from dq.cli.quantize import quantize
from dq.cli.recipes import recipes
from dq.cli.sensitivity import sensitivity
from dq.errors import DQError

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Quantize diffusion pipelines: really packed, honestly measured.",
)


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


_COMMANDS: dict[str, Callable[..., None]] = {
    "quantize": quantize,
    "generate": generate,
    "inspect": inspect,
    "export": export,
    "recipes": recipes,
    "sensitivity": sensitivity,
    "attention": attention,
    "bench": bench,
    "measure": measure,
    "eval": evaluate,
    "demo": demo,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)
