"""`ctseg import-mmar`: the numbers of a Clara Train MMAR become a recipe and a data list."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ctseg.commands.common import JsonFlag, Overrides, emit, pairs
from ctseg.errors import CtsegError
from ctseg.files import make_folder, write_json, write_text
from ctseg.foreign.importing import Imported, Request, import_mmar, report
from ctseg.foreign.render import render_recipe
from ctseg.progress import printable

FILES = ("recipe.toml", "manifest.json", "import.json")
ImportOutput = Annotated[Path, typer.Option("--output", help="Folder for recipe.toml, manifest.json and import.json.")]
ImportManifest = Annotated[Path | None, typer.Option("--manifest", help="Data list to take instead of its own.")]
ImportData = Annotated[Path | None, typer.Option("--data", help="Folder of the images, for the data list.")]


def import_mmar_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The MMAR: the folder that holds config/.")],
    output: ImportOutput,
    manifest: ImportManifest = None,
    data: ImportData = None,
    overrides: Overrides = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a recipe of a Clara Train MMAR; nothing in it is run, and what is not carried over is listed."""
    request = Request(folder=folder, output=output, overrides=overrides or [], manifest=manifest, data=data)
    run_import(import_mmar, request, as_json)


def run_import(read: Callable[[Request], Imported], request: Request, as_json: bool) -> None:
    """Imports a folder with `read`, writes what became of it, all files or none, and tells it.

    Raises:
        CtsegError: where a file would be replaced, or `read` refuses.
    """
    if not request.folder.is_dir():
        raise CtsegError(f"'{request.folder}': no such folder; name that of the MMAR or bundle")
    for name in FILES:
        if os.path.lexists(request.output / name):
            raise CtsegError(f"--output {request.output}: already holds a {name}; name another folder")
    imported = read(request)
    made = _write(imported, request.output)
    emit(made, "\n".join(map(printable, _text(imported, made).splitlines())), as_json)


def _write(imported: Imported, output: Path) -> dict[str, Any]:
    """Writes all files or none; returns what was made, as plain data."""
    recipe, data_list, about = (output / name for name in FILES)
    made = report(imported, recipe, None if imported.data_list is None else data_list)
    head = [
        f"{imported.recipe.name}: imported from {imported.folder.resolve().name}.",
        "The comment after a value names the file and the key that it came from; order x, y, z.",
        *(f"Not carried over: {left.where}: {left.name}: {left.reason}" for left in imported.left),
        *(f"Note: {note}" for note in imported.notes),
    ]
    make_folder(output)
    try:
        if imported.data_list is not None:
            write_json(data_list, imported.data_list.content)
        write_json(about, made)
        write_text(recipe, render_recipe(imported.recipe, imported.sources, head))
    except BaseException:
        for name in FILES:
            (output / name).unlink(missing_ok=True)
        raise
    return made


def _text(imported: Imported, made: dict[str, Any]) -> str:
    cases = "" if imported.data_list is None else f" ({imported.data_list.cases} cases)"
    rows: list[tuple[str, object]] = [
        ("recipe", made["recipe"]),
        ("data list", f"{made['manifest'] or 'none'}{cases}"),
        ("carried over", f"{len(imported.sources)} values, each with its source in the recipe"),
        ("not carried over", f"{len(imported.left)}" + (":" if imported.left else "")),
    ]
    rows += [("", f"{left.where}: {left.name}: {left.reason}") for left in imported.left]
    rows += [("note", note) for note in imported.notes]
    if imported.weights is not None:
        rows.append(("next", shlex.join(["ctseg", "finetune", made["recipe"], "--from", str(imported.folder)])))
    return pairs(rows)
