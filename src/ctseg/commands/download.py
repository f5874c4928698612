"""`ctseg download`: public data sets and models, fetched, verified, unpacked, and ready to use."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ctseg.commands.common import JsonFlag, Overrides, QuietFlag, emit, pairs
from ctseg.errors import CtsegError, DownloadError
from ctseg.manifest import data_folder
from ctseg.progress import make_progress
from ctseg.recipe import load_recipe, recipe_names
from ctseg.report.tables import render_table
from ctseg.sources.archives import SOURCE_FILE, read_record
from ctseg.sources.models import INDEX_VARIABLE, ModelEntry, model_index, user_index
from ctseg.sources.public import DataSet, data_sets, download_data_set, missing_files
from ctseg.workspace import MODELS, check_model, holds_model


def download(
    name: Annotated[str | None, typer.Argument(help="A data set or a model. Default: list them all.")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder of data sets. Default: $CTSEG_DATA, else ./data.")
    ] = None,
    given: Annotated[
        Path | None,
        typer.Option("--from", metavar="PATH", help="Take the archive from this file or folder, not the network."),
    ] = None,
    overrides: Overrides = None,
    keep_archive: Annotated[
        bool, typer.Option("--keep-archive", help="Keep the fetched archive after unpacking.")
    ] = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Fetch a public data set or a model: resumed after a stop, checksums verified, safely unpacked."""
    sets = data_sets()
    choice = _Choice(given=given, keep_archive=keep_archive, as_json=as_json, quiet=quiet)
    if name is None:
        if given is not None or overrides or keep_archive:
            raise CtsegError("--from, --set and --keep-archive need the NAME of what to download")
        _list(sets, model_index(), data or data_folder(), as_json)
    elif name in sets:
        if overrides:
            raise CtsegError(f"--set: is for models; '{name}' is a data set")
        _data_set(sets[name], data, choice)
    else:  # only now: what is wrong with an index of models does not keep anyone from a data set
        models = model_index()
        if name not in models:
            raise DownloadError(f"'{name}': neither a data set nor a model; known: {', '.join([*sets, *models])}")
        if data is not None:
            raise CtsegError(f"--data: is for data sets; '{name}' is a model and goes to {MODELS}/{name}")
        _model(name, models[name], overrides or [], choice)


def _list(sets: dict[str, DataSet], models: dict[str, ModelEntry], base: Path, as_json: bool) -> None:
    rows = [
        _row(s.name, "data", s.download.gigabytes, s.licence, s.download.purpose, _state_of_data(s, base / s.folder))
        for s in sets.values()
    ]
    rows += [
        _row(name, "model", entry.gigabytes, entry.licence, entry.title, _state_of_model(name, entry))
        for name, entry in models.items()
    ]
    columns = ("name", "kind", "gigabytes", "here", "licence", "what")
    shown = [{**row, "gigabytes": f"{row['gigabytes']:.1f}"} for row in rows]
    table = render_table(columns, [tuple(row[column] for column in columns) for row in shown])
    hint = f"`ctseg download NAME` fetches one. Data sets go to {base}/, models to {MODELS}/; add your own models in"
    emit(rows, f"{table}\n\n{hint} {user_index() or f'a file that {INDEX_VARIABLE} names'}", as_json)


def _row(name: str, kind: str, gigabytes: float, licence: str, what: str, here: str) -> dict[str, Any]:
    return {"name": name, "kind": kind, "gigabytes": gigabytes, "licence": licence, "what": what, "here": here}


def _state_of_data(data_set: DataSet, folder: Path) -> str:
    if not folder.is_dir():
        return "needs a login" if data_set.download.steps else "no"
    missing = len(missing_files(data_set, folder))
    return f"lacks {missing} files" if missing else "yes"


def _state_of_model(name: str, entry: ModelEntry) -> str:
    if entry.lacks_recipe:
        return f"needs recipe {entry.recipe}"
    if (MODELS / name).exists():
        return "yes" if holds_model(MODELS / name) else "another folder"
    return "no"


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """What the options say."""

    given: Path | None
    keep_archive: bool
    as_json: bool
    quiet: bool


def _data_set(data_set: DataSet, data: Path | None, choice: _Choice) -> None:
    base = data or data_folder()
    folder = base / data_set.folder
    there = folder.exists()
    with make_progress(choice.quiet) as progress:
        if not there:
            progress.note(f"{data_set.name}: {data_set.download.gigabytes} GB, licence: {data_set.licence}")
        about = download_data_set(data_set, base, choice.given, choice.keep_archive, progress)
    recipes = [name for name in recipe_names() if load_recipe(name).data.manifest == data_set.name]
    words = ["ctseg", "prepare-dataset", *(recipes[:1] or ["RECIPE", "--manifest", data_set.name])]
    following = shlex.join([*words, *([] if data is None else ["--data", str(data)])])
    _tell(_Result("data set", data_set.name, folder, there, data_set.licence, following), about, choice.as_json)


def _model(name: str, entry: ModelEntry, overrides: list[str], choice: _Choice) -> None:
    folder = MODELS / name
    there = folder.exists()
    if there:
        check_model(folder)
        if choice.given is not None or overrides or choice.keep_archive:
            with make_progress(choice.quiet) as progress:
                progress.note(
                    f"{folder}: was there already, so --from, --set and --keep-archive do nothing; "
                    f"delete it to make it anew"
                )
    else:
        if entry.lacks_recipe:
            raise DownloadError(f"model '{name}': needs recipe '{entry.recipe}', which this ctseg does not have")
        from ctseg.engine.install import download_model

        with make_progress(choice.quiet) as progress:
            progress.note(f"{name}: {entry.gigabytes} GB, licence: {entry.licence} {entry.source}".rstrip())
            download_model(name, entry, choice.given, overrides, choice.keep_archive, progress)
    if entry.recipe is not None and load_recipe(entry.recipe).clicks is not None:
        words = ["ctseg", "annotate", "CT", "--model", name, "--click", "X,Y,Z", "--output", "mask.nii.gz"]
    else:
        words = ["ctseg", "infer", "CT", "--model", name, "--output", "masks"]
    following = shlex.join(words)
    result = _Result("model", name, folder, there, entry.licence, following)
    _tell(result, read_record(folder), choice.as_json)


@dataclass(frozen=True)
class _Result:
    """What there is now."""

    kind: str
    name: str
    folder: Path
    was_there: bool
    licence: str
    next: str


def _tell(result: _Result, about: dict[str, Any] | None, as_json: bool) -> None:
    archives = [] if about is None else about["archives"]
    rows: list[tuple[str, object]] = [
        (result.kind, result.name),
        ("folder", f"{result.folder}{' (was there already)' if result.was_there else ''}"),
        ("licence", result.licence),
    ]
    for archive in archives:
        how = "as published" if archive["verified"] else "recorded as seen: nobody published a checksum of it"
        rows.append(("archive", f"{archive['file']}, sha256 {archive['digests']['sha256']}, {how}"))
    rows += [] if about is None else [("record", result.folder / SOURCE_FILE)]
    rows.append(("next", result.next))
    emit({**dataclasses.asdict(result), "archives": archives}, pairs(rows), as_json)
