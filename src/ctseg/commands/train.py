"""`ctseg train`: a recipe becomes a model."""

from __future__ import annotations

import dataclasses
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctseg.commands.common import (
    DataOption,
    DeviceOption,
    JsonFlag,
    ManifestOption,
    Overrides,
    PrecisionOption,
    PreparedOption,
    QuietFlag,
    emit,
    pairs,
)
from ctseg.errors import CtsegError, RecipeError
from ctseg.manifest import find_manifest
from ctseg.progress import make_progress
from ctseg.recipe import Recipe, load_recipe, recipe_names
from ctseg.sources.catalogue import PHANTOM, find_data
from ctseg.workspace import PREPARED, RECIPE_FILE, new_run, newest_run, run_precision, run_recipe

if TYPE_CHECKING:
    from ctseg.engine.train import TrainResult


def train(
    recipe: Annotated[
        str, typer.Argument(help="A recipe (`ctseg recipes`), a variant like spleen:small, or a .toml file.")
    ],
    gpus: Annotated[int | None, typer.Option(min=1, help="Train in this many processes, one per GPU.")] = None,
    output: Annotated[Path | None, typer.Option(help="Run folder. Default: a new one below runs/.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the newest run of the recipe, or with --output.")
    ] = False,
    manifest: ManifestOption = None,
    data: DataOption = None,
    prepared: PreparedOption = PREPARED,
    overrides: Overrides = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Train a recipe; progress and curves go to the run folder."""
    if resume and (manifest or data):
        raise CtsegError("--resume: goes on with the data of the run, so --manifest and --data cannot be given")
    wanted, run = (_resumed_run if resume else _fresh_run)(recipe, overrides, output)
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "RANK" not in os.environ:
        raise CtsegError("srun started several tasks; start one (srun --ntasks=1) and give --gpus N")
    if prepared.is_file():
        raise CtsegError(f"--prepared {prepared}: must be a folder, got a file")
    if resume and precision == "auto":
        precision = run_precision(run)  # type: ignore[assignment]  # checked where it is used
    if gpus is not None:
        from ctseg.engine.launch import check_gpus, is_launched, launch

        check_gpus(gpus, device)
    source = manifest or wanted.data.manifest
    if not resume and source != PHANTOM:  # made when it is needed
        find_manifest(source, data).split("training")
    if gpus is not None and gpus > 1 and not is_launched():
        launch(gpus, [*sys.argv[1:], "--output", str(run)])
        return
    from ctseg.engine import train as engine
    from ctseg.engine.runtime import running, stop_on_signal

    find = None if resume else partial(find_data, source, data)
    with running(device, precision, amp=wanted.training.amp) as runtime:
        with stop_on_signal() as stop_requested, make_progress(quiet or not runtime.is_main) as progress:
            run = runtime.gather(run)[0]  # torchrun's processes look for a free name at different moments
            progress.note(f"run {run} on {runtime.describe()}")
            result = engine.train(wanted, run, find, runtime, progress, prepared, stop_requested)
        if runtime.is_main:
            emit(dataclasses.asdict(result), _summary(result), as_json)


def _fresh_run(name: str, overrides: list[str] | None, output: Path | None) -> tuple[Recipe, Path]:
    recipe = load_recipe(name, overrides)
    if output is not None and output.is_file():
        raise CtsegError(f"--output {output}: must be a folder, got a file")
    if output is not None and (output / RECIPE_FILE).exists() and "RANK" not in os.environ:
        raise CtsegError(f"'{output}' already holds a run; continue it with --resume or choose another --output")
    return recipe, output or new_run(recipe)


def _resumed_run(name: str, overrides: list[str] | None, output: Path | None) -> tuple[Recipe, Path]:
    """The run to go on with and its own recipe; what is given anew, by --set or by a file, must agree with it."""
    recipe = load_recipe(name, overrides)
    run = output or newest_run(recipe.name)
    if run is None:
        raise CtsegError(f"--resume: no run of recipe '{recipe.name}' in 'runs/' of this folder; name it with --output")
    own = run_recipe(run)
    differing = _differences(recipe.to_dict(), own.to_dict())
    given_anew = overrides or recipe.name != own.name or name.partition(":")[0] not in recipe_names()
    if differing and given_anew:
        raise RecipeError(
            f"--resume: run '{run}' was started with another recipe; it differs in {', '.join(differing)}"
        )
    return own, run


def _differences(wanted: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """The keys, as section.key, whose values differ."""

    def flat(data: dict[str, Any]) -> dict[str, Any]:
        return {
            f"{s}.{k}": v
            for s, part in data.items()
            for k, v in (part if isinstance(part, dict) else {"": part}).items()
        }

    a, b = flat(wanted), flat(present)
    return sorted(key.rstrip(".") for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def _summary(result: TrainResult) -> str:
    rows: list[tuple[str, object]] = [("run", result.run), ("epochs", result.epochs), ("loss", f"{result.loss:.4f}")]
    if result.best_mean_dice is not None:
        rows.append(("best validation Dice", f"{result.best_mean_dice:.4f} (epoch {result.best_epoch})"))
    rows += [("model", result.checkpoint), ("curves", result.run / "curves.png")]
    return pairs(rows)
