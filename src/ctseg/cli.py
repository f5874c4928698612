"""The command line: registers the commands, and is the only place where errors become exit codes.

Nothing here or in `ctseg.commands` imports torch, monai or SimpleITK at module level: help and every wrong argument
are answered at once.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
from typing import Annotated

import typer

import ctseg
from ctseg import slurm
from ctseg.commands.annotate import annotate
from ctseg.commands.convert import convert
from ctseg.commands.demo import demo
from ctseg.commands.dicom import dicom
from ctseg.commands.doctor import doctor
from ctseg.commands.download import download
from ctseg.commands.export import export
from ctseg.commands.finetune import finetune
from ctseg.commands.import_bundle import import_bundle_command
from ctseg.commands.import_mmar import import_mmar_command
from ctseg.commands.infer import infer
from ctseg.commands.labels import labels
from ctseg.commands.prepare_dataset import prepare_dataset
from ctseg.commands.recipes import recipes
from ctseg.commands.serve import serve
from ctseg.commands.slurm import ARGUMENTS_OF_ANOTHER
from ctseg.commands.slurm import slurm as slurm_command
from ctseg.commands.train import train
from ctseg.commands.validate import validate
from ctseg.errors import CtsegError, Stopped
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

app = typer.Typer(
    name="ctseg",
    help="CT segmentation from the shell: train, validate, apply and export 3D networks.",
    epilog=EPILOG,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for command in (
    recipes,
    download,
    convert,
    labels,
    prepare_dataset,
    train,
    finetune,
    validate,
    infer,
    annotate,
    export,
    serve,
    doctor,
    demo,
):
    app.command()(command)
app.add_typer(dicom)
app.command("import-mmar")(import_mmar_command)
app.command("import-bundle")(import_bundle_command)
app.command("slurm", context_settings=ARGUMENTS_OF_ANOTHER)(slurm_command)


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
        signal.signal(signal.SIGUSR1, _stop)  # a batch job's last minutes may begin while PyTorch is being imported
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


def _stop(*_: object) -> None:
    raise Stopped("stopped by SIGUSR1 before there was anything to save; the same command starts again")


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
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
