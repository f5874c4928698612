"""`ctseg prepare-dataset`: the deterministic part of a recipe, once for every case."""

from __future__ import annotations

from typing import Annotated

import typer

from ctseg.commands.common import DataOption, JsonFlag, ManifestOption, Overrides, PreparedOption, QuietFlag, emit
from ctseg.progress import make_progress
from ctseg.recipe import Recipe, load_recipe
from ctseg.workspace import PREPARED, newest_run, run_recipe

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
    chosen, why = _choose(recipe, overrides)
    if not quiet:
        typer.echo(f"ctseg: {why}", err=True)
    from ctseg.engine.bank import prepare_bank
    from ctseg.sources.catalogue import find_data

    with make_progress(quiet) as progress:
        found = find_data(manifest or chosen.data.manifest, data, progress)
        cases = tuple(case for case in found.cases if case.split in ("training", "validation"))
        report = prepare_bank(cases, chosen, prepared, progress)
    text = (
        f"data set {found.name}: {len(report.made)} cases prepared, {len(report.ready)} were ready, "
        f"{report.num_bytes / 1e6:.0f} MB in {report.folder}\n"
        f"train on it with: ctseg train {chosen.name}"
    )
    result = {"data": found.name, "recipe": chosen.name, "made": report.made, "ready": report.ready}
    emit({**result, "folder": report.folder, "num_bytes": report.num_bytes}, text, as_json)


def _choose(name: str | None, overrides: list[str] | None) -> tuple[Recipe, str]:
    """The recipe to prepare for, and a sentence that says why this one."""
    if name is not None:
        return load_recipe(name, overrides), f"preparing for recipe {name}"
    run = newest_run()
    if run is not None and not overrides:
        recipe = run_recipe(run)
        return recipe, f"no recipe named: preparing for {recipe.name}, the recipe of the newest run here ({run})"
    recipe = load_recipe(DEMO_RECIPE, overrides)
    return (
        recipe,
        f"no recipe named and no run here: making the built-in demo data set and preparing it for {recipe.name}",
    )
