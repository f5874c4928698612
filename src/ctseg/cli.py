"""The command line: registers the commands, and is the only place where errors become exit codes.

Nothing here or in `ctseg.commands` imports torch, monai or SimpleITK at module level: help and every wrong argument
are answered at once.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

import ctseg
from ctseg.commands.demo import demo
from ctseg.commands.doctor import doctor
from ctseg.commands.export import export
from ctseg.commands.infer import infer
from ctseg.commands.prepare_dataset import prepare_dataset
from ctseg.commands.recipes import recipes
from ctseg.commands.train import train
from ctseg.commands.validate import validate
from ctseg.errors import CtsegError

EPILOG = (
    "Exit codes: 0 done, 1 some cases failed (or a demo that learned nothing), 2 wrong use or bad input, "
    "75 stopped by a signal and resumable. Research use only, not for diagnosis."
)

app = typer.Typer(
    name="ctseg",
    help="CT segmentation from the shell: train, validate, apply and export 3D networks.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for command in (recipes, prepare_dataset, train, validate, infer, export, doctor, demo):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ctseg {ctseg.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """CT segmentation from the shell: train, validate, apply and export 3D networks."""


def main() -> None:
    """Runs the command line and exits with its documented code; a bug keeps its traceback."""
    try:
        code = app(standalone_mode=False)
    except CtsegError as error:
        _fail(str(error), error.exit_code)
    except typer.Abort:
        _fail("interrupted", 130)
    except typer.TyperException as error:
        _fail(error.format_message(), getattr(error, "exit_code", 2))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # our reader is gone
        sys.exit(0)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    print(f"ctseg: {message}", file=sys.stderr)
    sys.exit(code)
