"""The command line: registers the commands, and is the only place where errors become exit codes.

Nothing here or in `ctseg.commands` imports torch, monai or SimpleITK at module level, and a command's module is
imported when that command is called: help and every wrong argument are answered at once.
"""

from __future__ import annotations

import atexit
import errno
import functools
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer
import typer.main
from typer.core import TyperGroup

import ctseg
from ctseg import slurm
from ctseg.errors import CtsegError, Stopped
from ctseg.lean import importing
from ctseg.progress import printable

EPILOG = (
    "Exit codes: 0 done, 1 some cases failed (or a demo learned nothing, or another process of the run ended), "
    "2 wrong use or bad input, 75 stopped by a signal and resumable, 130 interrupted. Research use only, not for "
    "diagnosis."
)

SEVERAL_PROCESSES = ("train", "finetune", "infer", "doctor", "recipes", "slurm")
"""Commands that share their work out, or change nothing, when srun or torchrun starts them several times."""

UNREACHABLE = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ESTALE)
"""Why the system will not even say whether a file is there."""

INTERRUPTED = 130
"""As in shells: 128 + SIGINT; typer returns it too."""

COMMANDS = {
    "recipes": "recipes:recipes",
    "download": "download:download",
    "convert": "convert:convert",
    "labels": "labels:labels",
    "prepare-dataset": "prepare_dataset:prepare_dataset",
    "train": "train:train",
    "finetune": "finetune:finetune",
    "validate": "validate:validate",
    "infer": "infer:infer",
    "annotate": "annotate:annotate",
    "export": "export:export",
    "serve": "serve:serve",
    "doctor": "doctor:doctor",
    "demo": "demo:demo",
    "dicom": "dicom:dicom",
    "import-mmar": "import_mmar:import_mmar_command",
    "import-bundle": "import_bundle:import_bundle_command",
    "slurm": "slurm:slurm",
}
"""Names in the order of the help: the module of `ctseg.commands`, and what in it is the command."""


class Commands(Mapping[str, Any]):
    """The commands by name; the module of one is imported when it is looked up."""

    def __getitem__(self, name: str) -> Any:
        return _command(name)

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


@functools.cache
def _command(name: str) -> Any:
    module_name, _, attribute = COMMANDS[name].partition(":")
    with importing():
        module = importlib.import_module(f"ctseg.commands.{module_name}")
    command = getattr(module, attribute)
    if not isinstance(command, typer.Typer):
        alone = typer.Typer(add_completion=False, rich_markup_mode=None)
        alone.command(name, context_settings=getattr(module, "CONTEXT_SETTINGS", None))(command)
        command = alone
    return typer.main.get_command(command)


class Group(TyperGroup):
    """`ctseg` itself, with the commands above."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**{**attributes, "commands": Commands()})


app = typer.Typer(
    name="ctseg",
    cls=Group,
    help="CT segmentation from the shell: train, validate, apply and export 3D networks.",
    epilog=EPILOG,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


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
    elif context.invoked_subcommand not in SEVERAL_PROCESSES and (processes := slurm.num_processes(os.environ)) > 1:
        raise CtsegError(
            f"started as {processes} processes, which would all do the same; `ctseg {context.invoked_subcommand}` is "
            f"one process: start one (srun --ntasks=1)"
        )


def main() -> None:
    """Runs the command line and exits with its documented code; a bug keeps its traceback."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGUSR1):  # a batch job may end while PyTorch is being imported
            signal.signal(number, _stop)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be text; stderr does so by itself
    try:
        code = app(standalone_mode=False)
    except CtsegError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        if error.errno not in UNREACHABLE or error.filename is None:
            raise
        _fail(f"'{str(error.filename)[:200]}': {error.strerror}; name another path or ask for access to it", 2)
    except typer.Abort:
        code = INTERRUPTED
    except typer.TyperException as error:
        _fail(error.format_message(), getattr(error, "exit_code", 2))
    if code == INTERRUPTED:
        _fail("interrupted", code)
    sys.exit(code if isinstance(code, int) else 0)


def program() -> None:
    """`main` as a process of its own, which then ends at once: to take torch or OpenVINO apart helps nobody."""
    try:
        main()
    except SystemExit as ending:
        if isinstance(ending.code, int):
            _end_at_once(ending.code)
        raise


def _end_at_once(code: int) -> None:
    """Ends the process as Python does, but neither waits for threads nor takes modules apart.

    What a thread may still do then is load a network that nothing was left for. Returns if output would be lost.
    """
    atexit._run_exitfuncs()
    try:
        _flush()
    except (OSError, ValueError):  # a full disk or a closed stream: Python's own ending tells it
        return
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # it is None in a process that was started without
            stream.flush()


def _stop(number: int, _frame: object) -> None:
    """Ends the process by an exception that nobody takes for an error of one of many files."""
    name = signal.Signals(number).name
    _fail(f"stopped by {name} before there was anything to save; the same command starts again", Stopped.exit_code)


def _fail(message: str, code: int) -> None:
    if message:
        lines = f"ctseg: {message}".splitlines()
        print(*(printable(line) for line in lines), sep="\n", file=sys.stderr)
    _leave_at_once_if_others_wait(code)
    sys.exit(code)


def _leave_at_once_if_others_wait(code: int) -> None:
    """Ends one of several processes without PyTorch's farewell, which would wait for the others."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        _flush()
        os._exit(code)
