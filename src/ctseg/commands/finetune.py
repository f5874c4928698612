"""`ctseg finetune`: training that starts from weights, of ctseg, an MMAR, a MONAI bundle or a bare state dict."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctseg.commands.common import (
    DataOption,
    DeviceOption,
    JsonFlag,
    ManifestOption,
    Overrides,
    PrecisionOption,
    PreparedOption,
    QuietFlag,
)
from ctseg.commands.train import (
    ChangeRecipeFlag,
    GpusOption,
    MaxGpuMemoryOption,
    MlflowOption,
    ResumeFlag,
    RunOption,
    Start,
    TrainOptions,
    resumed_run,
    run_training,
    train_options,
)
from ctseg.errors import CtsegError, ModelError
from ctseg.foreign.importing import WEIGHTS
from ctseg.workspace import PREPARED, START_REPORT, resolve_model

if TYPE_CHECKING:
    from ctseg.engine.weights import FitReport
    from ctseg.recipe import Recipe

SHOWN = 3
SUFFIX = "finetuned"
"""Stands in the name of a new run, after the recipe's."""


def finetune(
    recipe: Annotated[str, typer.Argument(help="A recipe, a variant, or a .toml file, with the weights' network.")],
    weights: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="WEIGHTS",
            help="Run, checkpoint, MMAR, MONAI bundle, or a .pt file with a state dict.",
        ),
    ] = None,
    new_head: Annotated[
        bool, typer.Option("--new-head", help="The weights have another number of classes: the last layer starts anew.")
    ] = False,
    freeze: Annotated[
        list[str] | None,
        typer.Option(metavar="PREFIX", help="Leave parameters whose names start so as they are; may be repeated."),
    ] = None,
    gpus: GpusOption = None,
    output: RunOption = None,
    resume: ResumeFlag = False,
    manifest: ManifestOption = None,
    data: DataOption = None,
    prepared: PreparedOption = PREPARED,
    overrides: Overrides = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    max_gpu_memory: MaxGpuMemoryOption = None,
    change_recipe: ChangeRecipeFlag = False,
    mlflow: MlflowOption = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Train a recipe on from weights; what matched is kept in the run as start.json."""
    options = train_options(locals())
    path = check_start(recipe, options, weights, new_head)
    start = None if path is None else partial(_start, path=path, new_head=new_head)
    run_training(recipe, options, start, suffix=SUFFIX)


def check_start(recipe: str, options: TrainOptions, weights: str | None, new_head: bool) -> Path | None:
    """The file of weights that a fine-tuning begins with; None if it goes on with a run.

    Raises:
        CtsegError: if there is none, or --resume goes with none of these options.
    """
    if not options.resume:
        if not weights:
            raise CtsegError(
                "--from: missing; name a run, a checkpoint, an MMAR, a bundle or a .pt file, or use --resume"
            )
        return find_weights(weights)
    if weights is not None or new_head:
        raise CtsegError("--resume: goes on with the weights of the run, so --from and --new-head cannot be given")
    _, run = resumed_run(recipe, options, finetuned=True)
    if not (run / START_REPORT).is_file():
        raise CtsegError(
            f"--resume: run '{run}' was not started by finetune; name another with --output, or use `ctseg train`"
        )
    return None


def find_weights(name: str) -> Path:
    """The file of weights that `name` means.

    Raises:
        ModelError: if there is none, or it is an exported file.
    """
    if (Path(name) / WEIGHTS).is_file():
        return Path(name) / WEIGHTS
    if name.endswith((".pth", ".ckpt")) and Path(name).is_file():
        return Path(name)
    try:
        path = resolve_model(name)
    except ModelError as error:
        folder = f"; nor has it {WEIGHTS}, as an MMAR or a bundle would" if Path(name).is_dir() else ""
        raise ModelError(f"--from: {error}{folder}") from error
    if path.suffix != ".pt":
        raise ModelError(f"--from {path}: an exported model cannot be trained; name its checkpoint (.pt)")
    return path


def _start(recipe: Recipe, path: Path, new_head: bool) -> Start:
    from ctseg.engine.weights import start_weights

    state, report = start_weights(recipe, path, new_head)
    return Start({"model": state, "report": report.to_dict()}, _told(report))


def _told(report: FitReport) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [
        ("started from", f"{report.source} ({report.kind})"),
        ("matched", f"{len(report.matched)} tensors: {_first(report.matched)}"),
    ]
    if report.new:
        rows.append(("started anew", f"{len(report.new)} tensors: {_first(report.new)}"))
    if report.frozen:
        rows.append(("frozen", f"{len(report.frozen)} parameters: {_first(report.frozen)}"))
    return rows + [("note", note) for note in report.notes]


def _first(names: tuple[str, ...]) -> str:
    return ", ".join(names[:SHOWN]) + (f", ... (all in {START_REPORT})" if len(names) > SHOWN else "")
