"""Training: step after step, validation every interval, a checkpoint every epoch.

A run that was killed at any moment and resumed ends with the same weights, bit for bit on a CPU, as one that was not;
see `trainer`. Several processes give the result of one, to float rounding; see `step`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ctseg.engine.click_evaluate import sample_dice
from ctseg.engine.evaluate import bank_dice
from ctseg.engine.ladder import halving
from ctseg.engine.mlflow_log import MlflowLog
from ctseg.engine.model import Model, forward_of
from ctseg.engine.record import Recorder
from ctseg.engine.step import Stepper
from ctseg.engine.trainer import Row, Trainer
from ctseg.errors import CtsegError, OutputError, Stopped
from ctseg.metrics import mean_or_none
from ctseg.progress import Progress
from ctseg.sampling import CaseArrays
from ctseg.workspace import RECIPE_FILE

StopRequested = Callable[[], bool]


def fit(
    trainer: Trainer,
    training: list[CaseArrays],
    validation: list[CaseArrays],
    run: Path,
    progress: Progress,
    stop_requested: StopRequested,
    mlflow_uri: str | None = None,
) -> Row | None:
    """Trains to the end and returns the best validated epoch, or None if none was validated.

    Args:
        trainer: Fresh, or loaded from `run`.
        training, validation: Prepared cases; validation may be empty.
        run: Folder for checkpoints and logs; only the main process writes.
        progress: Told of every epoch.
        stop_requested: Asked after every step and every validated case; once true, the state is saved and Stopped is
            raised.
        mlflow_uri: A server that gets each epoch's numbers too.

    Raises:
        CtsegError: if the loss is no longer finite.
        Stopped: after a stop request.
    """
    stepper = Stepper(trainer, training)
    recorder = _recorder(trainer, run, progress, mlflow_uri) if trainer.runtime.is_main else None
    stop = _Stop(trainer, run, stop_requested)
    progress.start(f"training {trainer.recipe.name}", trainer.recipe.training.epochs - trainer.epoch)
    try:
        while not trainer.finished:
            _run_steps(stepper, stop)
            row = _finish_epoch(trainer, validation, progress, stop)
            if recorder:
                _keep(trainer, row, run, recorder)
            progress.advance(_detail(row, trainer.best))
        if trainer.epoch < trainer.recipe.training.epochs and trainer.best:
            progress.note(f"ended early: no better validation Dice since epoch {trainer.best['epoch']}")
        trainer.runtime.wait_for_all()
    except BaseException:
        if recorder:
            _close_after(recorder, progress)
        raise
    if recorder:
        recorder.close()
    progress.finish()
    return trainer.best


def _recorder(trainer: Trainer, run: Path, progress: Progress, mlflow_uri: str | None) -> Recorder:
    mlflow = None if mlflow_uri is None else MlflowLog(run, trainer.recipe, mlflow_uri)
    return Recorder(run, trainer.recipe, trainer.history, mlflow, progress.note)


def _close_after(recorder: Recorder, progress: Progress) -> None:
    """Closes the logs without hiding what ended the training."""
    try:
        recorder.close(finished=False)
    except OutputError as error:
        progress.note(f"warning: {error}")


class _Stop:
    """Ends every process when one is asked to stop."""

    def __init__(self, trainer: Trainer, run: Path, requested: StopRequested) -> None:
        self.trainer = trainer
        self.run = run
        self.requested = requested

    def now(self) -> bool:
        """True in every process as soon as one was asked; all must call it at the same place."""
        return self.trainer.runtime.any_process(self.requested())

    def save_and_raise(self) -> None:
        """Saves the state and raises Stopped."""
        trainer, run = self.trainer, self.run
        _mean_loss(trainer)  # what has diverged is not kept
        if trainer.runtime.is_main:
            trainer.save(run)
        trainer.runtime.wait_for_all()
        if not trainer.runtime.is_main:
            raise Stopped  # the main process tells it
        raise Stopped(
            f"stopped by a signal in epoch {trainer.epoch + 1} after step {trainer.step}; "
            f"go on with: ctseg train {run / RECIPE_FILE} --resume --output {run}"
        )


def _run_steps(stepper: Stepper, stop: _Stop) -> None:
    """The epoch's remaining steps; afterwards `trainer.losses` holds one value for each of its steps."""
    trainer, batches = stepper.trainer, stepper.batches()
    stepper.begin_epoch()
    losses: list[Tensor] = []
    for batch in batches[trainer.step :]:
        losses.append(stepper.step(batch, len(batches)))
        trainer.step += 1
        if stop.now():
            trainer.losses.extend(torch.stack(losses).tolist())
            stop.save_and_raise()
    if losses:
        trainer.losses.extend(torch.stack(losses).tolist())  # from the device, all at once


def _finish_epoch(trainer: Trainer, validation: list[CaseArrays], progress: Progress, stop: _Stop) -> Row:
    """Closes the epoch: checks the loss, validates if it is time, appends the row to the history."""
    training, epoch = trainer.recipe.training, trainer.epoch + 1
    loss = _mean_loss(trainer)
    due = epoch % training.validation_interval_epochs == 0 or epoch == training.epochs
    mean_dice = _validate(trainer, validation, progress, stop) if due and validation else None
    trainer.epoch, trainer.step, trainer.losses = epoch, 0, []
    lr = float(trainer.optimizer.param_groups[0]["lr"])
    row = {"epoch": epoch, "loss": loss, "mean_dice": mean_dice, "lr": lr}
    trainer.history.append(row)
    return row


def _mean_loss(trainer: Trainer) -> float:
    """Mean loss of the epoch's steps.

    An overflow of gradients in float16 is nothing: the scaler skips that step. One of the network's own values, which
    shows in the loss, is not undone in the batch statistics.

    Raises:
        CtsegError: if it is not finite.
    """
    loss = sum(trainer.losses) / len(trainer.losses) if trainer.losses else math.nan
    if not math.isfinite(loss):
        half = "; or choose --precision bfloat16" if trainer.scaler.is_enabled() else ""
        raise CtsegError(
            f"training diverged: the loss of epoch {trainer.epoch + 1} is {loss}; lower optimizer.lr{half}"
        )
    return loss


def _validate(trainer: Trainer, cases: list[CaseArrays], progress: Progress, stop: _Stop) -> float | None:
    """Mean Dice over all cases; each process takes its share of them, each case is counted once."""
    runtime, network = trainer.runtime, trainer.model
    runtime.copy_from_main(network.buffers())  # batch statistics: those that the checkpoint holds are scored
    forward = forward_of(network, runtime)
    if runtime.device.type != "cpu":
        forward = halving(forward, runtime.device, progress.note)
    model = Model(trainer.recipe, forward, runtime, stop.run, "")
    progress.start("validating", math.ceil(len(cases) / runtime.world_size))
    values = []
    for first in range(0, len(cases), runtime.world_size):
        if first and stop.now():  # the epoch's steps are saved, its validation begins anew
            stop.save_and_raise()
        for case in cases[first + runtime.rank : first + runtime.world_size][:1]:
            if trainer.recipe.clicks is not None:
                values.append(sample_dice(model, case, first + runtime.rank))
            else:
                values.extend(bank_dice(model, case, trainer.recipe.training.validation_overlap))
        progress.advance(cases[first].name)
    progress.finish()
    return mean_or_none([value for share in runtime.gather(values) for value in share])


def _keep(trainer: Trainer, row: Row, run: Path, recorder: Recorder) -> None:
    """The log, the checkpoint, the best weights.

    Killed before the checkpoint, the epoch is repeated and gives the same row. Killed before the best weights, they are
    those of the checkpoint and are written when the run goes on.
    """
    recorder.write(trainer.history)
    trainer.save(run)
    if row is trainer.best:
        trainer.save_best(run, row)


def _detail(row: Row, best: Row | None) -> str:
    scored = "" if row["mean_dice"] is None else f"  validation Dice {row['mean_dice']:.4f}"
    return f"loss {row['loss']:.4f}{scored}" + (f"  best {best['mean_dice']:.4f}" if best else "")
