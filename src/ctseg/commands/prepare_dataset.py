"""`ctseg prepare-dataset`: a data set checked, split and mended, then what a recipe does once for every case."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctseg.commands.common import (
    DataOption,
    JsonFlag,
    ManifestOption,
    Overrides,
    PreparedOption,
    QuietFlag,
    emit,
    pairs,
)
from ctseg.dataset.splits import parse_percentages, split_by_percentages, split_into_folds
from ctseg.errors import CtsegError, ManifestError
from ctseg.files import make_folder
from ctseg.manifest import SPLITS, Manifest, first_cases
from ctseg.progress import make_progress, printable
from ctseg.recipe import Recipe, load_recipe
from ctseg.report.tables import render_table
from ctseg.sources.catalogue import locate_data
from ctseg.workspace import DATA_FILE, PREPARED, RECIPE_FILE, newest_run, run_recipe

if TYPE_CHECKING:
    from ctseg.dataset.curate import Curated
    from ctseg.engine.bank import BankReport
    from ctseg.engine.samples import OrganCount

DEMO_RECIPE = "spleen:small"

SplitOption = Annotated[
    str | None,
    typer.Option(
        "--split", metavar="80/10/10", help="Deal out the labelled cases, in percent: training/validation[/testing]."
    ),
]
FoldsOption = Annotated[int | None, typer.Option("--folds", min=2, help="Cross-validation: number of parts.")]
FoldOption = Annotated[int | None, typer.Option("--fold", min=1, help="Which of the --folds is validation, from 1.")]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, help="Another seed gives another split. Default: 0.")]
ResplitFlag = Annotated[bool, typer.Option("--resplit", help="Deal out anew what is split already.")]
FixFlag = Annotated[
    bool, typer.Option("--fix", help="Mend what is safe: labels slightly off their image's grid, repeated cases.")
]
CheckFlag = Annotated[bool, typer.Option("--check-only", help="Prepare nothing.")]
ListOption = Annotated[
    Path | None,
    typer.Option(
        "--write-manifest", metavar="FILE", help="The resulting data list. Default: in the --prepared folder."
    ),
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, help="Only the first so many cases of each split, to try things out.")
]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, help="Cases at once. Default: as CPUs and memory allow.")
]


def prepare_dataset(
    recipe: Annotated[
        str | None, typer.Argument(help="Default: the recipe of the newest run here, else the built-in demo data set.")
    ] = None,
    manifest: ManifestOption = None,
    data: DataOption = None,
    prepared: PreparedOption = PREPARED,
    overrides: Overrides = None,
    split: SplitOption = None,
    folds: FoldsOption = None,
    fold: FoldOption = None,
    seed: SeedOption = None,
    resplit: ResplitFlag = False,
    fix: FixFlag = False,
    check_only: CheckFlag = False,
    write_manifest: ListOption = None,
    limit: LimitOption = None,
    workers: WorkersOption = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Check a data set and prepare it for a recipe: read, resample, window, crop; ready to train from."""
    divide, division = _division(split, folds, fold, seed, resplit)
    chosen, why, run = _choose(recipe, overrides)
    if run is not None and manifest is None and data is None:
        manifest = str(run / DATA_FILE)
    _check_list_file(write_manifest, manifest)
    if not quiet:
        typer.echo(f"ctseg: {why}", err=True)
    with make_progress(quiet) as progress:
        found = locate_data(manifest or chosen.data.manifest, data, progress)
        if limit is not None:
            found, division = first_cases(found, limit), f"first {limit} {division}".strip()
        if not (check_only or divide):
            found.split("training")
        make_folder(prepared)
        if write_manifest is None and (divide or fix or limit):
            write_manifest = prepared / _list_name(found, division)
            _check_list_file(write_manifest, manifest)
        from ctseg.dataset.curate import Wishes, curate
        from ctseg.engine.process import stop_on_signal

        wishes = Wishes(divide=divide, division=division, fix=fix, list_file=write_manifest)
        report, organs = None, []
        with stop_on_signal() as stop_requested:
            curated = curate(found, chosen, prepared, wishes, progress, stop_requested, workers)
            if not (curated.errors or check_only):
                from ctseg.engine.bank import prepare_bank

                cases = curated.manifest.to_prepare
                report = prepare_bank(cases, chosen, prepared, progress, stop_requested, workers)
                if chosen.clicks is not None:
                    from ctseg.engine.samples import count_organs

                    organs = count_organs(cases, prepared, chosen, curated.manifest.labels)
    if curated.list_file is not None:
        manifest, data = str(curated.list_file), None
    name = recipe or (chosen.name if run is None else str(run / RECIPE_FILE))
    train = shlex.join(["ctseg", "train", *_given(name, manifest, data, prepared, overrides)])
    emit(_result(curated, chosen, report, organs), _text(curated, report, train, organs), as_json)
    if curated.errors:
        raise ManifestError(
            f"data set '{found.name}': errors to put right: {len(curated.errors)}, listed above and in "
            f"{curated.report}; nothing was prepared"
        )


def _division(
    split: str | None, folds: int | None, fold: int | None, seed: int | None, again: bool
) -> tuple[Callable[[Manifest], Manifest] | None, str]:
    """What deals the cases out as the options say, and the same in words; None and nothing without."""
    if split is not None and folds is not None:
        raise CtsegError("--split and --folds: each deals out the cases, give one")
    if (folds is None) != (fold is None):
        raise CtsegError("--folds and --fold: belong together, as in --folds 5 --fold 1")
    if folds is not None and fold is not None:
        if fold > folds:
            raise CtsegError(f"--fold {fold}: there are only {folds} folds, numbered from 1")
        by_fold = partial(split_into_folds, folds=folds, fold=fold, seed=seed or 0, again=again)
        return by_fold, f"fold {fold} of {folds}, seed {seed or 0}"
    if split is None:
        if seed is not None or again:
            raise CtsegError(f"{'--resplit' if again else '--seed'}: only with --split or --folds")
        return None, ""
    by_percentages = partial(split_by_percentages, percentages=parse_percentages(split), seed=seed or 0, again=again)
    return by_percentages, f"split {split}, seed {seed or 0}"


def _check_list_file(path: Path | None, manifest: str | None) -> None:
    if path is None:
        return
    if path.suffix != ".json":
        raise CtsegError(f"--write-manifest {path}: a data list's name must end in .json")
    if path.is_dir():
        raise CtsegError(f"--write-manifest {path}: must be a file, got a folder")
    if manifest is not None and path.exists() and Path(manifest).exists() and path.samefile(manifest):
        raise CtsegError(f"'{path}' is the list that is read; name another file with --write-manifest")


def _list_name(found: Manifest, division: str) -> str:
    """E.g. `Task09_Spleen-split-80-10-10-seed-0.json`, `Task09_Spleen-fixed.json`."""
    words = f"{found.name[:100]} {division or 'fixed'}"
    return re.sub(r"[^\w.]+", "-", words, flags=re.ASCII).strip("-.") + ".json"


def _result(curated: Curated, recipe: Recipe, report: BankReport | None, organs: list[OrganCount]) -> dict[str, Any]:
    done = {} if report is None else dataclasses.asdict(report)
    if recipe.clicks is not None and report is not None:
        done["organs"] = [dataclasses.asdict(organ) for organ in organs]
    return {
        "data": curated.manifest.name,
        "recipe": recipe.name,
        "splits": _counts(curated.manifest),
        "manifest": curated.list_file,
        "findings": [dataclasses.asdict(finding) for finding in curated.findings],
        "report": curated.report,
        **done,
    }


def _counts(manifest: Manifest) -> dict[str, int]:
    """Split -> number of its cases, for splits that have any."""
    counts = Counter(case.split for case in manifest.cases)
    return {split: counts[split] for split in SPLITS if counts[split]}


def _text(curated: Curated, report: BankReport | None, train: str, organs: list[OrganCount]) -> str:
    name = printable(curated.manifest.name)
    counts = ", ".join(f"{number} {split}" for split, number in _counts(curated.manifest).items())
    parts = []
    if curated.findings:
        rows = [(printable(f"{f.severity}: {f.case or 'data set'}"), printable(f.text)) for f in curated.findings]
        parts += [pairs(rows), ""]
    if report is None or curated.findings:
        by_severity = Counter(finding.severity for finding in curated.findings)
        found = ", ".join(f"{severity} {number}" for severity, number in by_severity.items()) or "nothing wrong"
        parts.append(f"data set {name} checked: {found} ({counts}); table in {curated.report}")
    if curated.list_file is not None:
        parts.append(f"data list of {counts} in {curated.list_file}")
    if organs:
        table = [(o.value, printable(o.organ), o.samples, o.voxels) for o in organs]
        parts += [render_table(("value", "organ", "samples", "voxels"), table), ""]
    if report is not None:
        parts.append(
            f"data set {name}: {len(report.made)} cases prepared, {len(report.ready)} were ready, "
            f"{report.num_bytes / 1e6:.0f} MB in {report.folder}\ntrain on it with: {train}"
        )
    return "\n".join(parts)


def _given(
    recipe: str, manifest: str | None, data: Path | None, prepared: Path, overrides: list[str] | None
) -> list[str]:
    """The arguments with which `ctseg train` finds what was prepared."""
    options = {"--manifest": manifest, "--data": data, "--prepared": None if prepared == PREPARED else prepared}
    named = [word for name, value in options.items() if value is not None for word in (name, str(value))]
    return [recipe, *named, *(word for override in overrides or [] for word in ("--set", override))]


def _choose(name: str | None, overrides: list[str] | None) -> tuple[Recipe, str, Path | None]:
    """The recipe to prepare for, a sentence that says why this one, and the run it is from if from one."""
    if name is not None:
        return load_recipe(name, overrides), f"preparing for recipe {name}", None
    run = newest_run()
    if overrides:
        raise CtsegError("--set needs the name of the RECIPE that it changes")
    if run is not None:
        recipe = run_recipe(run)
        return recipe, f"no recipe named: preparing for {recipe.name}, the recipe of the newest run here ({run})", run
    recipe = load_recipe(DEMO_RECIPE)
    why = f"no recipe named and no run here: making the built-in demo data set and preparing it for {recipe.name}"
    return recipe, why, None
