"""`ctseg validate`: Dice of a model on a split, on the labels' own grids."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctseg.commands.common import (
    BackendOption,
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
from ctseg.files import folder_if_used
from ctseg.jobs import ModelChoice
from ctseg.manifest import SPLITS, Manifest, read_manifest
from ctseg.progress import make_progress
from ctseg.recipe import Recipe
from ctseg.report.tables import render_table
from ctseg.sources.catalogue import find_data
from ctseg.workspace import DATA_FILE, resolve_model, run_of, run_recipe

if TYPE_CHECKING:
    from ctseg.engine.click_evaluate import ClickEvaluation, ClickSummary
    from ctseg.engine.evaluate import Evaluation, LesionScores
    from ctseg.progress import Progress


ClicksOption = Annotated[
    int | None,
    typer.Option("--clicks", min=1, max=1000, help="Simulated clicks of an annotation model. Default: its recipe's."),
]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, help="Another seed gives other clicks. Default: 0.")]


def validate(
    split: Annotated[str, typer.Option(help=f"Which cases: {', '.join(SPLITS)}.")] = "testing",
    model: ModelOption = None,
    manifest: ManifestOption = None,
    data: DataOption = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of the tables. Default: validation-SPLIT[-PRECISION][-fast] in the run."),
    ] = None,
    overlays: Annotated[bool, typer.Option("--overlays", help="Also draw a picture of every case.")] = False,
    clicks: ClicksOption = None,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    backend: BackendOption = "auto",
    fast: FastFlag = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Score a model on a split: per-case Dice, mean, standard deviation, range; lesions where the recipe has them.

    An annotation model is scored by simulated clicks: Dice after each, and clicks to reach 0.85, 0.90 and 0.95.
    """
    if split not in SPLITS:
        raise CtsegError(f"--split {split}: expected one of {', '.join(SPLITS)}")
    path = resolve_model(model)
    target = output or (run_of(path) or Path()) / _folder_name(split, path, precision, fast=fast)
    with make_progress(quiet) as progress:
        found = _find_cases(path, manifest, data, split, progress)
    with folder_if_used(target), make_progress(quiet) as progress:
        from ctseg.engine.click_evaluate import evaluate_clicks, write_click_evaluation
        from ctseg.engine.evaluate import evaluate, write_evaluation
        from ctseg.engine.model import fast_in_bfloat16, load_to_segment
        from ctseg.engine.run_manifest import model_facts
        from ctseg.engine.runtime import running

        choice = ModelChoice(path=path, device=device, precision=precision, backend=backend, fast=fast)
        with running(device, precision, amp=True, fast=fast and fast_in_bfloat16(path, backend)) as runtime:
            loaded = load_to_segment(choice, runtime, progress.note)
            progress.note(f"model {path} on {loaded.runtime.describe()}, {loaded.backend}{', fast' if fast else ''}")
            _check_click_options(loaded.recipe, clicks, seed, overlays=overlays, fast=fast)
            listed = found or find_data(loaded.recipe.data.manifest, data, progress)
            cases = listed.split(split)
            about = {**model_facts(loaded), "model": str(path), "fast": fast, "manifest": listed.name, "split": split}
            evaluation: Evaluation | ClickEvaluation
            if loaded.recipe.clicks is None:
                evaluation = evaluate(loaded, cases, progress, target / "overlays" if overlays else None, fast=fast)
                write_evaluation(target, evaluation, about)
                text, table = _text(evaluation, path, target), "cases.csv"
            else:
                number = clicks or loaded.recipe.clicks.num_clicks
                evaluation = evaluate_clicks(loaded, cases, listed.labels, number, seed or 0, progress)
                write_click_evaluation(target, evaluation, about)
                text, table = _click_text(evaluation, path, target), "clicks.csv"
    emit({**about, **evaluation.to_dict(), "folder": target}, text, as_json)
    if evaluation.failed:
        raise CasesFailed(f"{len(evaluation.failed)} of {len(cases)} cases failed; see {target / table}")


def _folder_name(split: str, model: Path, precision: str, *, fast: bool) -> str:
    """One for each way of running that is asked for, so that no table replaces another's."""
    exported = "" if model.suffix == ".pt" else model.suffix.removeprefix(".")
    ways = (exported, "" if precision == "auto" else precision, "fast" if fast else "")
    return "-".join(["validation", split, *filter(None, ways)])


def _check_click_options(recipe: Recipe, clicks: int | None, seed: int | None, *, overlays: bool, fast: bool) -> None:
    if recipe.clicks is None and (clicks is not None or seed is not None):
        option = "--clicks" if clicks is not None else "--seed"
        raise CtsegError(f"{option}: recipe {recipe.name} segments without clicks; leave it out")
    if recipe.clicks is not None and overlays:
        raise CtsegError(f"--overlays: recipe {recipe.name} has a mask for each organ and click; leave it out")
    if recipe.clicks is not None and fast:
        raise CtsegError(f"--fast: recipe {recipe.name} looks at windows around clicks only; leave it out")


def _find_cases(
    model: Path, manifest: str | None, data: Path | None, split: str, progress: Progress
) -> Manifest | None:
    """The data the user names, else that of the model's run; None where only the recipe inside the model says."""
    run = run_of(model)
    if run is not None and manifest is None and data is None and (run / DATA_FILE).is_file():
        return _with_split(read_manifest(run / DATA_FILE), split)
    if manifest is None and run is not None:
        manifest = run_recipe(run).data.manifest
    return None if manifest is None else _with_split(find_data(manifest, data, progress), split)


def _with_split(manifest: Manifest, split: str) -> Manifest:
    """The data list itself, once it is known to have cases in the split."""
    manifest.split(split)
    return manifest


def _text(evaluation: Evaluation, model: Path, folder: Path) -> str:
    lesions = "" if evaluation.lesions is None else f"\n\n{_lesion_table(evaluation.lesions)}\n"
    return f"model {model}\n\n{score_table(evaluation)}{lesions}\ntables in {folder}"


def _click_text(evaluation: ClickEvaluation, model: Path, folder: Path) -> str:
    rows = [
        (s.organ, s.cases, *(s.mean_dice[n - 1] for n in _shown_clicks(evaluation.num_clicks)), *_reached(s))
        for s in (*evaluation.organs, *([evaluation.overall] if evaluation.overall else []))
    ]
    dice = [f"dice@{n}" for n in _shown_clicks(evaluation.num_clicks)]
    targets = [f"clicks to {key}" for key in (evaluation.overall.mean_clicks if evaluation.overall else ())]
    table = render_table(("organ", "cases", *dice, *targets), rows)
    failed = "".join(f"\nfailed: {case}: {error}" for case, error in evaluation.failed.items())
    rule = (
        f"clicks to a Dice: mean over cases, {evaluation.num_clicks} where it is not reached (in brackets how often); "
        f"seed {evaluation.seed}"
    )
    return f"model {model}\n\n{table}\n\n{rule}{failed}\ntables and curves in {folder}"


def _shown_clicks(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if n in (1, 2, 3, 5, 10, 15, number)]


def _reached(summary: ClickSummary) -> list[str]:
    return [f"{mean:.1f} ({summary.not_reached[key]})" for key, mean in summary.mean_clicks.items()]


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
