"""The command line: registers the commands, and is the only place where errors become exit codes.

Nothing here or in `ctseg.commands` imports torch, monai or SimpleITK at module level: help and every wrong argument
are answered at once.
"""

from __future__ import annotations

import io
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
from ctseg.progress import printable

EPILOG = (
    "Exit codes: 0 done, 1 some cases failed (or a demo that learned nothing), 2 wrong use or bad input, "
    "75 stopped by a signal and resumable, 130 interrupted. Research use only, not for diagnosis."
)

INTERRUPTED = 130
"""As in shells: 128 + SIGINT; typer returns it too."""

app = typer.Typer(
    name="ctseg",
    help="CT segmentation from the shell: train, validate, apply and export 3D networks.",
    epilog=EPILOG,
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


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """CT segmentation from the shell: train, validate, apply and export 3D networks."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Runs the command line and exits with its documented code; a bug keeps its traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be text; stderr does so by itself
    try:
        code = app(standalone_mode=False)
    except CtsegError as error:
        _fail(str(error), error.exit_code)
    except typer.Abort:
        code = INTERRUPTED
    except typer.TyperException as error:
        _fail(error.format_message(), getattr(error, "exit_code", 2))
    if code == INTERRUPTED:
        _fail("interrupted", code)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    if message:
        lines = f"ctseg: {message}".splitlines()
        print(*(printable(line) for line in lines), sep="\n", file=sys.stderr)
    sys.exit(code)
