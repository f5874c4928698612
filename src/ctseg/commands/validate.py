"""`ctseg validate`: Dice of a model on a split, on the labels' own grids."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctseg.commands.common import (
    DataOption,
    DeviceOption,
    FastFlag,
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
from ctseg.report.tables import render_table
from ctseg.sources.catalogue import find_data
from ctseg.workspace import DATA_FILE, resolve_model, run_of, run_recipe

if TYPE_CHECKING:
    from ctseg.engine.evaluate import Evaluation, LesionScores
    from ctseg.manifest import Case
    from ctseg.progress import Progress


def validate(
    split: Annotated[str, typer.Option(help=f"Which cases: {', '.join(SPLITS)}.")] = "testing",
    model: ModelOption = None,
    manifest: ManifestOption = None,
    data: DataOption = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the tables. Default: validation-SPLIT[-fast] in the run.")
    ] = None,
    overlays: Annotated[bool, typer.Option("--overlays", help="Also draw a picture of every case.")] = False,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    fast: FastFlag = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Score a model on a split: per-case Dice, mean, standard deviation, range; lesions where the recipe has them."""
    if split not in SPLITS:
        raise CtsegError(f"--split {split}: expected one of {', '.join(SPLITS)}")
    path = resolve_model(model)
    target = output or (run_of(path) or Path()) / f"validation-{split}{'-fast' if fast else ''}"
    with make_progress(quiet) as progress:
        found = _find_cases(path, manifest, data, split, progress)
        make_folder(target)
        from ctseg.engine.evaluate import evaluate, write_evaluation
        from ctseg.engine.model import fast_in_bfloat16, load_model
        from ctseg.engine.runtime import running

        with running(device, precision, amp=True, fast=fast and fast_in_bfloat16(path)) as runtime:
            loaded = load_model(path, runtime)
            progress.note(f"model {path} on {runtime.describe()}{', fast' if fast else ''}")
            cases = found or find_data(loaded.recipe.data.manifest, data, progress).split(split)
            evaluation = evaluate(loaded, cases, progress, target / "overlays" if overlays else None, fast=fast)
    write_evaluation(target, evaluation, path, split)
    emit(
        {**evaluation.to_dict(), "model": path, "split": split, "folder": target},
        _text(evaluation, path, target),
        as_json,
    )
    if evaluation.failed:
        raise CasesFailed(f"{len(evaluation.failed)} of {len(cases)} cases failed; see {target / 'cases.csv'}")


def _find_cases(
    model: Path, manifest: str | None, data: Path | None, split: str, progress: Progress
) -> tuple[Case, ...] | None:
    """The cases the user names, else those of the model's run; None where only the recipe inside the model says."""
    run = run_of(model)
    if run is not None and manifest is None and data is None and (run / DATA_FILE).is_file():
        return read_manifest(run / DATA_FILE).split(split)
    if manifest is None and run is not None:
        manifest = run_recipe(run).data.manifest
    return None if manifest is None else find_data(manifest, data, progress).split(split)


def _text(evaluation: Evaluation, model: Path, folder: Path) -> str:
    lesions = "" if evaluation.lesions is None else f"\n\n{_lesion_table(evaluation.lesions)}\n"
    return f"model {model}\n\n{score_table(evaluation)}{lesions}\ntables in {folder}"


def _lesion_table(lesions: LesionScores) -> str:
    """Lesions by volume class, and false positives; the definitions stand in `lesions.py`."""
    rows = [(s.structure, s.volume_ml, s.lesions, s.found, s.sensitivity, s.mean_dice) for s in lesions.summaries]
    table = render_table(("lesions of", "volume_ml", "lesions", "found", "sensitivity", "mean_dice"), rows)
    false_positives = [
        f"{s.structure}: {s.false_positives_per_case:.2f} false positives per case"
        for s in lesions.summaries
        if s.false_positives_per_case is not None
    ]
    rule = f"a lesion is a 26-connected part of the label, found when the mask covers {lesions.min_overlap:.0%} of it"
    return "\n".join([table, "", *false_positives, rule])
