"""A downloaded model becomes a folder that `--model` takes: its recipe, and its weights as a checkpoint of ctseg."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ctseg.engine.checkpoint import BEST, save_checkpoint
from ctseg.engine.weights import start_weights
from ctseg.errors import ModelError, RecipeError
from ctseg.files import output_errors, write_json
from ctseg.foreign.importing import WEIGHTS, Imported, Request, import_bundle, import_mmar, report
from ctseg.progress import Progress
from ctseg.recipe import load_recipe
from ctseg.sources.archives import (
    SOURCE_FILE,
    Order,
    becoming,
    check_obtainable,
    keep_archives,
    obtain,
    proved,
    record,
    workplace,
)
from ctseg.sources.models import WEIGHTS_SUFFIXES, ModelEntry, is_model_folder, unpack_model
from ctseg.workspace import MODELS, RECIPE_FILE, check_model

IMPORT_REPORT = "import.json"
"""What of the original's configuration became of the recipe, and what did not."""
MANIFEST = "manifest.json"


def download_model(
    name: str, entry: ModelEntry, given: Path | None, overrides: list[str], keep_archive: bool, progress: Progress
) -> Path:
    """The folder `models/NAME`, made from the model's published files; it exists only when it is whole.

    Args:
        name: The model's name.
        entry: What the index says of it.
        given: An archive, a file of weights, or the folder of an MMAR or a bundle, instead of the network.
        overrides: As with --set, after those of the index.
        keep_archive: Leaves a fetched archive in `models`.
        progress: Told of every megabyte.

    Raises:
        CtsegError: if the files cannot be had, are not what they should be, or do not say all that a model needs.
    """
    target = MODELS / name
    order = Order(name=name, archives=(entry.archive,), max_bytes=entry.max_bytes)
    if entry.lacks_recipe:
        raise ModelError(f"model '{name}': needs recipe '{entry.recipe}', which this ctseg does not have")
    ready = given if given is not None and given.is_dir() and is_model_folder(given) else None
    if ready is None and not target.exists():
        check_obtainable(order, given)
    with workplace(target) as work:
        if work is None:
            check_model(target)
            return target
        fetched = [] if ready else obtain(order, given, work, progress)
        with proved(fetched, work), becoming(target, work) as folder:
            source = ready or _unpacked(fetched[0].path, folder / name, entry, progress)
            weights = install_model(source, folder, target, entry, overrides)
            about = record(name, entry.licence, entry.source, fetched)
            write_json(folder / SOURCE_FILE, {**about, "weights": weights})
            shutil.rmtree(folder / name, ignore_errors=True)
            if keep_archive:
                keep_archives(fetched, work)
    return target


def _unpacked(archive: Path, folder: Path, entry: ModelEntry, progress: Progress) -> Path:
    if archive.name.endswith(WEIGHTS_SUFFIXES):
        return archive
    with output_errors(folder):
        folder.mkdir()
    unpack_model(archive, folder, 2 * entry.max_bytes, progress)
    return folder


def install_model(source: Path, folder: Path, target: Path, entry: ModelEntry, overrides: list[str]) -> dict[str, Any]:
    """Writes the recipe and the checkpoint of a model to `folder`, which becomes `target`; how the weights fitted.

    Raises:
        RecipeError: naming what the original's configuration, or the index, does not say.
        ModelError: if the weights hold more than plain data or do not fit the recipe's network.
    """
    changes = [*entry.overrides, *overrides]
    imported = None
    if entry.recipe is not None:
        recipe = load_recipe(entry.recipe, changes)
    elif source.is_dir():
        imported = _imported(source, target, changes)
        recipe = imported.recipe
    else:
        raise RecipeError(
            f"'{source}': weights alone do not say which network they fit; name the whole archive or folder, or give "
            f"the entry of the index a recipe"
        )
    weights = source / WEIGHTS if source.is_dir() else source
    state, fit = start_weights(recipe, weights, new_head=False)
    if imported is not None:
        _write_import(imported, folder, target)
    save_checkpoint(folder / BEST, {"recipe": recipe.to_dict(), "model": state})
    write_json(folder / RECIPE_FILE, recipe.to_dict())
    return {"sha256": fit.sha256, "kind": fit.kind, "notes": list(fit.notes)}


def _imported(source: Path, target: Path, overrides: list[str]) -> Imported:
    request = Request(folder=source, output=target, overrides=overrides, manifest=None, data=None)
    return import_mmar(request) if (source / "config").is_dir() else import_bundle(request)


def _write_import(imported: Imported, folder: Path, target: Path) -> None:
    data_list = imported.data_list
    if data_list is not None:
        write_json(folder / MANIFEST, data_list.content)
    told = report(imported, target / RECIPE_FILE, None if data_list is None else target / MANIFEST)
    write_json(folder / IMPORT_REPORT, {**told, "weights": None})
