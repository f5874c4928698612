"""Where things lie in the current folder: `runs/` trainings, `prepared/` cases, `data/` data sets, `models/` downloads.

A run folder holds `recipe.json` (the resolved recipe), `data.json` (its cases, as a manifest), checkpoints and logs.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ctseg.errors import CtsegError, DownloadError, ModelError, RecipeError
from ctseg.files import make_folder, output_errors, write_json, write_text
from ctseg.manifest import SPLITS, Case, Manifest
from ctseg.recipe import Recipe, load_recipe, recipe_from_dict, recipe_names

RUNS = Path("runs")
MODELS = Path("models")
"""Downloaded models: folders like those of runs, with a recipe and a checkpoint."""
PREPARED = Path("prepared")
RECIPE_FILE, DATA_FILE = "recipe.json", "data.json"
CHECKPOINTS = ("best.pt", "last.pt")
START, START_REPORT = "start.pt", "start.json"
"""In a fine-tuned run: its first weights; where they came from, and which of them."""
STARTING = ".starting"
"""In a run's folder while its first files are written."""
MODEL_SUFFIXES = (".pt", ".ts", ".onnx")
EXPORT_SUFFIXES = {"torchscript": ".ts", "onnx": ".onnx"}


def new_run(recipe: Recipe, suffix: str = "") -> Path:
    """The first free `runs/RECIPE-NNN` (with a suffix `runs/RECIPE-SUFFIX-NNN`); not created yet."""
    stem = f"{recipe.slug}-{suffix}" if suffix else recipe.slug
    number = 1
    while (RUNS / f"{stem}-{number:03d}").exists():
        number += 1
    return RUNS / f"{stem}-{number:03d}"


def reserve_run(recipe: Recipe, suffix: str = "") -> Path:
    """A new run folder, made now: of two that begin at the same moment, each has its own."""
    while True:
        run = new_run(recipe, suffix)
        with output_errors(run):
            run.parent.mkdir(parents=True, exist_ok=True)
            try:
                run.mkdir()
            except FileExistsError:
                continue
        return run


def run_recipe(run: Path) -> Recipe:
    """The resolved recipe of a run folder.

    Raises:
        CtsegError: if the folder holds no run.
    """
    if not (run / RECIPE_FILE).is_file():
        raise CtsegError(f"'{run}' is not a run folder: it has no {RECIPE_FILE}")
    try:
        data = json.loads((run / RECIPE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"'{run / RECIPE_FILE}': cannot be read: {error}") from error
    return recipe_from_dict(data, f"recipe of run '{run}'")


def newest_run(recipe_name: str | None = None, *, trained: bool = False, finetuned: bool | None = None) -> Path | None:
    """The run in `runs/` that was written to last, of one recipe if given, with a checkpoint if `trained`, or None.

    With `finetuned` one that `ctseg finetune` has started, or one that it has not; None: either.
    """
    found = []
    for file in RUNS.glob(f"*/{RECIPE_FILE}"):
        run = file.parent
        if finetuned is not None and (run / START_REPORT).exists() != finetuned:
            continue
        checkpoints = [run / name for name in CHECKPOINTS if (run / name).exists()]
        if recipe_name in (None, _recipe_name(file)) and (checkpoints or not trained):
            found.append((max(f.stat().st_mtime_ns for f in (file, *checkpoints)), run))
    return max(found, default=(0, None), key=lambda pair: (pair[0], str(pair[1])))[1]


def _recipe_name(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("name")
    except (OSError, ValueError, RecursionError, AttributeError):
        return None


def start_run(
    run: Path,
    recipe: Recipe,
    manifest: Manifest,
    precision: str = "auto",
    write_start: Callable[[], None] = lambda: None,
) -> None:
    """Creates the run folder with its recipe, its cases and its precision. Of two started at once, one gets it.

    `write_start` writes what else a run begins with.

    Raises:
        CtsegError: if the folder already holds a run, or files of others that are called as those of a run.
        OutputError: if it cannot be written to or locked.
    """
    make_folder(run)
    folder = os.open(run, os.O_RDONLY)
    try:
        with output_errors(run):
            fcntl.flock(folder, fcntl.LOCK_EX)  # released by the kernel, also when this process is killed
        if (run / RECIPE_FILE).exists():
            raise CtsegError(f"'{run}' already holds a run; continue it with --resume or choose another --output")
        if not (run / STARTING).exists():  # else they are of a start that was killed
            _check_nobodys(run)
            write_text(run / STARTING, "")
        for name in (START, START_REPORT):
            (run / name).unlink(missing_ok=True)
        write_start()
        write_json(run / DATA_FILE, {**manifest_to_dict(manifest), "precision": precision})
        write_json(run / RECIPE_FILE, recipe.to_dict())
        (run / STARTING).unlink()
    finally:
        os.close(folder)


def _check_nobodys(run: Path) -> None:
    """Raises CtsegError if a folder without a run holds files that a run would replace."""
    there = [name for name in (DATA_FILE, START, START_REPORT, *CHECKPOINTS, "previous.pt") if (run / name).exists()]
    if there:
        raise CtsegError(
            f"'{run}' holds {', '.join(there)}, but no run of ctseg, which would replace them; choose another --output"
        )


def forget_run(run: Path) -> None:
    """Takes back what a training writes before it begins, unless it has a checkpoint: the same command can begin again.

    What else there is stays.
    """
    if any((run / name).exists() for name in CHECKPOINTS):
        return
    for name in (RECIPE_FILE, DATA_FILE, START_REPORT, START):
        (run / name).unlink(missing_ok=True)
    with suppress(OSError):  # it holds something else
        run.rmdir()


def replace_recipe(run: Path, recipe: Recipe) -> None:
    """Lets the run go on with another recipe; the old one is kept as `recipe-before-NNN.json`."""
    number = 1
    while (run / f"recipe-before-{number:03d}.json").exists():
        number += 1
    old = run_recipe(run)
    if old != recipe:
        write_json(run / f"recipe-before-{number:03d}.json", old.to_dict())
        write_json(run / RECIPE_FILE, recipe.to_dict())


def run_precision(run: Path) -> str:
    """The precision a run was started with, or "auto" if it does not say."""
    try:
        return str(json.loads((run / DATA_FILE).read_text(encoding="utf-8")).get("precision", "auto"))
    except (OSError, ValueError, RecursionError, AttributeError):
        return "auto"


def manifest_to_dict(manifest: Manifest) -> dict[str, Any]:
    """The manifest as plain data that `read_manifest` reads back, with absolute paths."""

    def entry(case: Case) -> dict[str, Any]:
        label = {} if case.label is None else {"label": str(case.label.absolute())}
        weight = {} if case.weight == 1 else {"weight": case.weight}
        patient = {} if case.patient is None else {"patient": case.patient}
        return {"image": str(case.image.absolute()), **label, **weight, **patient}

    splits = {s: [entry(c) for c in manifest.cases if c.split == s] for s in SPLITS}
    about = {"name": manifest.name, "licence": manifest.licence, "source": manifest.source, "labels": manifest.labels}
    return {**about, **splits}


def resolve_model(name: str | None) -> Path:
    """The file of the model that `name` means.

    Args:
        name: A checkpoint or exported file, a run folder (its path, or its name below `runs/`), a downloaded model, or
            a recipe (its newest run here); None for the newest run.

    Raises:
        ModelError: saying what was looked for and where.
    """
    if name is not None and Path(name).is_file() and not name.endswith((".toml", ".json")):
        if not name.endswith(MODEL_SUFFIXES):
            raise ModelError(f"model '{name}': unknown kind of file; known: {', '.join(MODEL_SUFFIXES)}")
        return Path(name)
    places = () if name is None else (Path(name), RUNS / name, MODELS / name)
    run = next((place for place in places if (place / RECIPE_FILE).is_file()), None)
    if run is None and name is not None and Path(name).is_dir() and name.partition(":")[0] not in recipe_names():
        raise ModelError(f"model '{name}': not a run folder, it has no {RECIPE_FILE}")
    if run is None and name is not None and not _may_be_recipe(name):
        raise ModelError(f"model '{name}': no such file or folder")
    if run is None:
        recipe_name = None if name is None else _recipe_called(name)
        run = newest_run(recipe_name, trained=True)
        if run is None:
            what = "no trained run" if recipe_name is None else f"no trained run of recipe '{recipe_name}'"
            raise ModelError(f"{what} in '{RUNS}/' of this folder; train one with `ctseg train`, or name a --model")
    for checkpoint in CHECKPOINTS:
        if (run / checkpoint).is_file():
            return run / checkpoint
    raise ModelError(f"run '{run}': no checkpoint yet ({' or '.join(CHECKPOINTS)})")


def _recipe_called(name: str) -> str:
    """The name of a recipe that may have been trained here."""
    base = name.partition(":")[0]
    if base in recipe_names() or Path(base).is_file():
        return load_recipe(name).name
    raise ModelError(
        f"model '{name}': no file, run, downloaded model or recipe of that name here; known recipes: "
        f"{', '.join(recipe_names())}; `ctseg download` lists models to fetch"
    )


def holds_model(folder: Path) -> bool:
    """True of the folder of a downloaded model that is whole."""
    return all((folder / name).is_file() for name in (RECIPE_FILE, CHECKPOINTS[0]))


def check_model(folder: Path) -> None:
    """Raises DownloadError if something else stands where a downloaded model is to be."""
    if not holds_model(folder):
        raise DownloadError(f"'{folder}' is there but is no model of ctseg; move it away and run again")


def _may_be_recipe(name: str) -> bool:
    """`spleen`, `spleen:small`, `my.toml`, `my.toml:small`, but not `runs/nothing` and not `best.pt`."""
    path = Path(name.partition(":")[0])
    return path.suffix in (".toml", ".json") or (path.suffix == "" and path.name == str(path))


def run_of(model: Path) -> Path | None:
    """The run folder a model file lies in, if any."""
    return model.parent if (model.parent / RECIPE_FILE).is_file() else None
