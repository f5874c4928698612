"""`ctseg prepare-dataset`: the deterministic part of a recipe, once for every case."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ctseg.commands.common import DataOption, JsonFlag, ManifestOption, Overrides, PreparedOption, QuietFlag, emit
from ctseg.errors import CtsegError
from ctseg.files import make_folder
from ctseg.manifest import check_files, read_manifest
from ctseg.progress import make_progress
from ctseg.recipe import Recipe, load_recipe
from ctseg.sources.catalogue import find_data
from ctseg.workspace import DATA_FILE, PREPARED, newest_run, run_recipe

DEMO_RECIPE = "spleen:small"


def prepare_dataset(
    recipe: Annotated[
        str | None, typer.Argument(help="Default: the recipe of the newest run here, else the built-in demo data set.")
    ] = None,
    manifest: ManifestOption = None,
    data: DataOption = None,
    prepared: PreparedOption = PREPARED,
    overrides: Overrides = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Prepare a data set for a recipe: read, resample, window, crop; ready to train from."""
    chosen, why, run = _choose(recipe, overrides)
    if not quiet:
        typer.echo(f"ctseg: {why}", err=True)
    with make_progress(quiet) as progress:
        if run is not None and manifest is None and data is None:
            found = check_files(read_manifest(run / DATA_FILE))
        else:
            found = find_data(manifest or chosen.data.manifest, data, progress)
        cases = found.to_prepare
        make_folder(prepared)
        from ctseg.engine.bank import prepare_bank

        report = prepare_bank(cases, chosen, prepared, progress)
    given = shlex.join(_given(recipe or chosen.name, manifest, data, prepared, overrides))
    text = (
        f"data set {found.name}: {len(report.made)} cases prepared, {len(report.ready)} were ready, "
        f"{report.num_bytes / 1e6:.0f} MB in {report.folder}\n"
        f"train on it with: ctseg train {given}"
    )
    result = {"data": found.name, "recipe": chosen.name, "made": report.made, "ready": report.ready}
    emit({**result, "folder": report.folder, "num_bytes": report.num_bytes}, text, as_json)


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
