"""A whole training: cases -> bank -> fit, in a run folder, on one process or several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ctseg.engine.bank import bank_folder, open_bank, prepare_bank
from ctseg.engine.checkpoint import BEST, LAST
from ctseg.engine.fit import Trainer, fit
from ctseg.engine.runtime import Runtime
from ctseg.errors import CtsegError, Stopped
from ctseg.manifest import Manifest, check_files, read_manifest
from ctseg.progress import Progress
from ctseg.recipe import Recipe
from ctseg.workspace import DATA_FILE, PREPARED, start_run

FindData = Callable[[Progress], Manifest]
"""Finds (or makes) the cases; asked only in the main process and only for a new run."""


@dataclass(frozen=True)
class TrainResult:
    """What a training ended with."""

    run: Path
    checkpoint: Path
    epochs: int
    loss: float
    best_epoch: int | None
    best_mean_dice: float | None


def train(
    recipe: Recipe,
    run: Path,
    find_data: FindData | None,
    runtime: Runtime,
    progress: Progress,
    prepared: Path = PREPARED,
    stop_requested: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Trains `recipe` in `run` to its last epoch; `find_data` None resumes the run that lies there.

    Raises:
        CtsegError: if the data, the run folder or the machine does not allow it.
        Stopped: after a stop request, with everything saved.
    """
    problem: CtsegError | None = None
    if runtime.is_main:
        try:
            manifest = _set_up(recipe, run, find_data(progress) if find_data else None, runtime.precision)
            prepare_bank(manifest.to_prepare, recipe, prepared, progress, stop_requested)
        except CtsegError as error:
            problem = error
    _raise_together(runtime, problem)
    manifest = read_manifest(run / DATA_FILE)
    folder = bank_folder(prepared, recipe)
    training = open_bank(manifest.split("training"), folder, runtime.device)
    validation = open_bank(manifest.validation, folder, runtime.device)
    trainer = Trainer.fresh(recipe, runtime)
    trainer.load(run)
    best = fit(trainer, training, validation, run, progress, stop_requested)
    return TrainResult(
        run=run,
        checkpoint=run / (BEST if best else LAST),
        epochs=trainer.epoch,
        loss=trainer.history[-1]["loss"],
        best_epoch=best["epoch"] if best else None,
        best_mean_dice=best["mean_dice"] if best else None,
    )


def _raise_together(runtime: Runtime, problem: CtsegError | None) -> None:
    """Ends every process with the main process's problem, if it has one: told there, in short by the others."""
    told = runtime.gather(problem)[0]
    if problem is not None:
        raise problem
    if isinstance(told, Stopped):
        raise Stopped
    if told is not None:
        raise CtsegError(f"the main process could not set up the run: {told}")


def _set_up(recipe: Recipe, run: Path, manifest: Manifest | None, precision: str) -> Manifest:
    """The cases of the run, which is started with `manifest` unless that is None."""
    if manifest is not None:
        manifest.split("training")
        start_run(run, recipe, manifest, precision)
    return check_files(read_manifest(run / DATA_FILE))
