"""`ctseg validate`: Dice of a model on a split, on the labels' own grids."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctseg.commands.common import (
    DataOption,
    DeviceOption,
    JsonFlag,
    ManifestOption,
    ModelOption,
    PrecisionOption,
    QuietFlag,
    emit,
    score_table,
)
from ctseg.errors import CasesFailed, CtsegError
from ctseg.files import make_folder
from ctseg.manifest import SPLITS, read_manifest
from ctseg.progress import make_progress
from ctseg.report.scores import write_evaluation
from ctseg.workspace import DATA_FILE, resolve_model, run_of

if TYPE_CHECKING:
    from ctseg.engine.evaluate import Evaluation
    from ctseg.engine.model import Model
    from ctseg.manifest import Manifest
    from ctseg.progress import Progress


def validate(
    split: Annotated[str, typer.Option(help=f"Which cases: {', '.join(SPLITS)}.")] = "testing",
    model: ModelOption = None,
    manifest: ManifestOption = None,
    data: DataOption = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the tables. Default: validation-SPLIT in the run.")
    ] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Score a model on a split: per-case Dice, mean, standard deviation and range."""
    if split not in SPLITS:
        raise CtsegError(f"--split {split}: expected one of {', '.join(SPLITS)}")
    path = resolve_model(model)
    target = make_folder(output or (run_of(path) or Path()) / f"validation-{split}")
    from ctseg.engine.evaluate import evaluate
    from ctseg.engine.model import load_model
    from ctseg.engine.runtime import running

    with running(device, precision, amp=True) as runtime, make_progress(quiet) as progress:
        loaded = load_model(path, runtime)
        progress.note(f"model {path} on {runtime.describe()}")
        cases = _find_cases(loaded, manifest, data, progress).split(split)
        evaluation = evaluate(loaded, cases, progress)
    write_evaluation(target, evaluation, path, split)
    emit(
        {**evaluation.to_dict(), "model": path, "split": split, "folder": target},
        _text(evaluation, path, target),
        as_json,
    )
    if evaluation.failed:
        raise CasesFailed(f"{len(evaluation.failed)} of {len(cases)} cases failed; see {target / 'cases.csv'}")


def _find_cases(model: Model, manifest: str | None, data: Path | None, progress: Progress) -> Manifest:
    """The cases the user names, else those of the model's run, else those of its recipe."""
    from ctseg.sources.catalogue import find_data

    run = run_of(model.path)
    if manifest is None and data is None and run is not None and (run / DATA_FILE).is_file():
        return read_manifest(run / DATA_FILE)
    return find_data(manifest or model.recipe.data.manifest, data, progress)


def _text(evaluation: Evaluation, model: Path, folder: Path) -> str:
    return f"model {model}\n\n{score_table(evaluation)}\ntables in {folder}"
