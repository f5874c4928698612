"""A whole training: cases -> bank -> fit, in a run folder, on one process or several."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ctseg.engine.bank import Room, bank_fingerprint, bank_folder, prepare_bank
from ctseg.engine.checkpoint import BEST, LAST, PREVIOUS, save_checkpoint
from ctseg.engine.determinism import set_determinism
from ctseg.engine.fit import fit
from ctseg.engine.memory import fit_into_memory, limit_gpu
from ctseg.engine.mlflow_log import check_mlflow
from ctseg.engine.process import peak_memory_bytes
from ctseg.engine.runtime import Runtime, memory_errors
from ctseg.engine.samples import open_samples
from ctseg.engine.trainer import Trainer
from ctseg.errors import CtsegError, PeerLost, Stopped
from ctseg.files import write_json
from ctseg.manifest import Manifest, check_files, read_manifest
from ctseg.progress import Progress
from ctseg.recipe import Recipe
from ctseg.workspace import (
    DATA_FILE,
    PREPARED,
    START,
    START_REPORT,
    forget_run,
    replace_recipe,
    start_run,
)

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
    peak_memory_gb: float
    """Of the GPU where there is one, else of the process."""


def train(
    recipe: Recipe,
    run: Path,
    find_data: FindData | None,
    runtime: Runtime,
    progress: Progress,
    prepared: Path = PREPARED,
    stop_requested: Callable[[], bool] = lambda: False,
    *,
    start: dict[str, Any] | None = None,
    change_recipe: bool = False,
    max_gpu_bytes: int | None = None,
    mlflow_uri: str | None = None,
) -> TrainResult:
    """Trains `recipe` in `run` to its end; `find_data` None resumes the run that lies there.

    Args:
        recipe: For a resumed run its own, unless `change_recipe`.
        run: The run folder.
        find_data: See FindData.
        runtime: Where to compute.
        progress: Told of every epoch.
        prepared: Where prepared cases lie.
        stop_requested: Asked often; see `fit`.
        start: What a new run starts with instead of random weights: "model" (a state dict that fits the network) and
            "report" (where it came from), kept as `start.pt` and `start.json`.
        change_recipe: A resumed run goes on with `recipe` and with its cases as they are now.
        mlflow_uri: See `fit`.
        max_gpu_bytes: Steps go through the network in as many passes as this much GPU memory demands.

    Raises:
        CtsegError: if the data, the run folder or the machine does not allow it.
        Stopped: after a stop request, with everything saved.
    """
    if max_gpu_bytes is not None:
        limit_gpu(runtime, max_gpu_bytes)  # before anything lies there
    if mlflow_uri is not None:
        check_mlflow()
    with ExitStack() as begun:
        problem: CtsegError | None = None
        if runtime.is_main:
            try:
                manifest = _set_up(recipe, run, find_data(progress) if find_data else None, runtime.precision, start)
                if find_data is not None:
                    begun.push(partial(_forget_what_failed, run))
                prepare_bank(manifest.to_prepare, recipe, prepared, progress, stop_requested)
            except CtsegError as error:
                problem = error
        _raise_together(runtime, problem)
        begun.enter_context(memory_errors(f"training {recipe.name}", runtime.device))
        manifest = read_manifest(run / DATA_FILE)
        folder = bank_folder(prepared, recipe)
        room = Room.on(runtime.device, max_gpu_bytes)
        training, validation = (
            open_samples(cases, prepared, recipe, manifest.labels, runtime.device, room)
            for cases in (manifest.split("training"), manifest.validation)
        )
        if remark := set_determinism(recipe, runtime.device):
            progress.note(remark)
        trainer = Trainer.fresh(recipe, runtime, bank_fingerprint(manifest.to_prepare, folder))
        if warning := trainer.load(run, changed=change_recipe):
            progress.note(f"warning: {warning}")
        if find_data is None:
            progress.note(f"goes on after epoch {trainer.epoch} of {recipe.training.epochs}")
        if len(set(runtime.gather((trainer.epoch, trainer.step)))) > 1:
            raise CtsegError(
                f"run '{run}': the processes do not read the same checkpoint; is the folder on a shared disk?"
            )
        if max_gpu_bytes is not None:
            trainer.patches_per_pass = fit_into_memory(trainer, max_gpu_bytes, progress)
        if runtime.is_main:
            trainer.repair_best(run)
            if change_recipe:
                replace_recipe(run, recipe)
            if trainer.changed:
                trainer.save(run)
                (run / PREVIOUS).unlink(missing_ok=True)  # of the old recipe: nothing to fall back on
        best = fit(trainer, training, validation, run, progress, stop_requested, mlflow_uri)
        return TrainResult(
            run=run,
            checkpoint=run / (BEST if best else LAST),
            epochs=trainer.epoch,
            loss=trainer.history[-1]["loss"],
            best_epoch=best["epoch"] if best else None,
            best_mean_dice=best["mean_dice"] if best else None,
            peak_memory_gb=peak_memory_bytes(runtime.device) / 1e9,
        )


def _forget_what_failed(
    run: Path, _kind: type[BaseException] | None, error: BaseException | None, _traceback: object
) -> None:
    """Takes back a new run that an error has ended before anything was trained; a stopped one can be resumed."""
    if isinstance(error, CtsegError) and not isinstance(error, Stopped | PeerLost):
        forget_run(run)


def _raise_together(runtime: Runtime, problem: CtsegError | None) -> None:
    """Ends every process with the main process's problem, if it has one: told there, in short by the others."""
    told = runtime.gather(problem)[0]
    if problem is not None:
        raise problem
    if isinstance(told, Stopped):
        raise Stopped
    if told is not None:
        raise CtsegError(f"the main process could not set up the run: {told}")


def _set_up(
    recipe: Recipe, run: Path, manifest: Manifest | None, precision: str, start: dict[str, Any] | None
) -> Manifest:
    """The cases of the run, which is started with `manifest` unless that is None."""
    if manifest is not None:
        manifest.split("training")
        start_run(run, recipe, manifest, precision, partial(_keep_start, run, recipe, start))
    else:
        _sweep(run)
    return check_files(read_manifest(run / DATA_FILE))


def _keep_start(run: Path, recipe: Recipe, start: dict[str, Any] | None) -> None:
    """Writes what a new run starts with, if it is given."""
    if start is not None:
        save_checkpoint(run / START, {"recipe": recipe.to_dict(), **start})
        write_json(run / START_REPORT, start["report"])


def _sweep(run: Path) -> None:
    """Removes what a kill in the middle of writing has left."""
    for leftover in run.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
