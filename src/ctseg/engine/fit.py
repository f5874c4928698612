"""Training: patches -> network -> loss -> step, validation every interval, a checkpoint every epoch.

Everything random is a function of the seed and the place in the training (see `sampling`), and everything else that
training goes on from stands in the checkpoint. So a run that was killed at any moment and resumed ends with the same
weights, bit for bit on a CPU, as one that was not.

With several processes a step's patches are dealt out by rank and gradients are averaged by their share: the batch of
the recipe is the batch of all processes together. Statistics of batch normalisation and the Dice term's sums are
taken over each process's own patches (over all on CUDA for batch normalisation).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ctseg.engine.checkpoint import BEST, LAST, read_checkpoint, save_checkpoint
from ctseg.engine.evaluate import bank_dice
from ctseg.engine.model import Model, forward_of
from ctseg.engine.record import Recorder
from ctseg.engine.runtime import Runtime
from ctseg.errors import CtsegError, ModelError, Stopped
from ctseg.metrics import mean_or_none
from ctseg.networks import network_for
from ctseg.objectives import build_loss, build_optimizer, learning_rate
from ctseg.progress import Progress
from ctseg.recipe import Recipe
from ctseg.sampling import NETWORK, CaseArrays, Draw, cut_batch, draw_step, epoch_batches, generator
from ctseg.workspace import RECIPE_FILE

Row = dict[str, Any]
"""One epoch of the log: epoch, loss, mean_dice (None when not validated), lr."""


@dataclass(eq=False)
class Trainer:
    """All that changes while training, and what it changes with."""

    recipe: Recipe
    runtime: Runtime
    network: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    epoch: int = 0
    """Epochs done."""
    step: int = 0
    """Steps done in the running epoch."""
    losses: list[float] = field(default_factory=list)
    """Loss of each step done in the running epoch, the mean over processes."""
    history: list[Row] = field(default_factory=list)

    @classmethod
    def fresh(cls, recipe: Recipe, runtime: Runtime) -> Trainer:
        """A training at its first step; the weights follow from the recipe's seed."""
        torch.manual_seed(recipe.training.seed)
        network = network_for(recipe).to(runtime.device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        if runtime.world_size > 1 and runtime.device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.amp_dtype is torch.float16)
        return cls(recipe, runtime, network, build_optimizer(recipe.optimizer, network.parameters()), scaler)

    @property
    def best(self) -> Row | None:
        """The epoch with the highest validation Dice, the first of equals."""
        validated = [row for row in self.history if row["mean_dice"] is not None]
        return max(validated, key=lambda row: row["mean_dice"], default=None)

    def save(self, run: Path) -> None:
        """Writes the checkpoint to go on from."""
        content = {
            "recipe": self.recipe.to_dict(),
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "losses": self.losses,
            "history": self.history,
        }
        save_checkpoint(run / LAST, content)

    def save_best(self, run: Path, row: Row) -> None:
        """Writes the weights of the best epoch so far."""
        content = {"recipe": self.recipe.to_dict(), "model": self.network.state_dict(), **row}
        save_checkpoint(run / BEST, content)

    def load(self, run: Path) -> None:
        """Goes to where `save` left off; stays at the start if it never came to that.

        Raises:
            ModelError: if the checkpoint is damaged or belongs to another recipe.
        """
        if not (run / LAST).exists():
            return
        content = read_checkpoint(run / LAST)  # on the CPU: each part goes to its own device when it is loaded
        if content.get("recipe") != self.recipe.to_dict():
            raise ModelError(f"checkpoint '{run / LAST}': written by another recipe than this run's")
        try:
            self.network.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            if content["scaler"]:  # empty when saved without mixed precision
                self.scaler.load_state_dict(content["scaler"])
            self.epoch, self.step = content["epoch"], content["step"]
            self.losses, self.history = content["losses"], content["history"]
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise ModelError(f"checkpoint '{run / LAST}': incomplete or damaged") from error


def fit(
    trainer: Trainer,
    training: list[CaseArrays],
    validation: list[CaseArrays],
    run: Path,
    progress: Progress,
    stop_requested: Callable[[], bool],
) -> Row | None:
    """Trains to the recipe's last epoch and returns the best validated epoch, or None if none was validated.

    Args:
        trainer: Fresh, or loaded from `run`.
        training, validation: Prepared cases; validation may be empty.
        run: Folder for checkpoints and logs; only the main process writes.
        progress: Told of every epoch.
        stop_requested: Asked after every step; once true, the state is saved and Stopped is raised.

    Raises:
        CtsegError: if the loss is no longer finite.
        Stopped: after a stop request.
    """
    epochs = trainer.recipe.training.epochs
    recorder = Recorder(run, trainer.recipe, trainer.history) if trainer.runtime.is_main else None
    model = Model(trainer.recipe, forward_of(trainer.network, trainer.runtime), trainer.runtime, run, "")
    stepper = _Stepper(trainer, training)
    progress.start(f"training {trainer.recipe.name}", epochs - trainer.epoch)
    try:
        while trainer.epoch < epochs:
            stepper.run_epoch(run, stop_requested)
            row = _finish_epoch(trainer, model, validation, progress)
            if recorder:
                _keep(trainer, row, run, recorder)
            progress.advance(_detail(row, trainer.best))
        trainer.runtime.wait_for_all()
    finally:
        if recorder:
            recorder.close()
    progress.finish()
    return trainer.best


class _Stepper:
    """Runs the optimisation steps of an epoch."""

    def __init__(self, trainer: Trainer, cases: list[CaseArrays]) -> None:
        self.trainer = trainer
        self.cases = cases
        self.loss = build_loss(trainer.recipe.objective)
        self._check_shares()
        distributed = trainer.runtime.world_size > 1
        if distributed:  # a 1x1x1 kernel's strides are ambiguous; the notice concerns a few hundred bytes
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        self.network: nn.Module = DistributedDataParallel(trainer.network) if distributed else trainer.network

    def run_epoch(self, run: Path, stop_requested: Callable[[], bool]) -> None:
        """The epoch's remaining steps; afterwards `trainer.losses` holds one value for each of its steps."""
        trainer, training = self.trainer, self.trainer.recipe.training
        batches = epoch_batches(len(self.cases), training.batch_cases, training.seed, trainer.epoch)
        self.network.train()
        losses: list[Tensor] = []
        for batch in batches[trainer.step :]:
            self._set_rate(trainer.epoch * len(batches) + trainer.step, len(batches))
            losses.append(self._step(batch))
            trainer.step += 1
            if trainer.runtime.any_process(stop_requested()):
                self._collect(losses)
                self._stop(run)
        self._collect(losses)

    def _set_rate(self, step: int, steps_per_epoch: int) -> None:
        recipe = self.trainer.recipe
        lr = learning_rate(recipe.schedule, recipe.optimizer.lr, step, steps_per_epoch, recipe.training.epochs)
        for group in self.trainer.optimizer.param_groups:
            group["lr"] = lr

    def _check_shares(self) -> None:
        """Every process needs a patch in every step, the epoch's last and smallest one included."""
        recipe, processes = self.trainer.recipe, self.trainer.runtime.world_size
        cases = len(self.cases) % recipe.training.batch_cases or recipe.training.batch_cases
        patches = min(cases, len(self.cases)) * recipe.sampling.patches_per_case
        if patches < processes:
            raise CtsegError(
                f"{processes} processes, but the smallest step of an epoch has only {patches} patches; use fewer, "
                f"or raise training.batch_cases or sampling.patches_per_case"
            )

    def _collect(self, losses: list[Tensor]) -> None:
        """Fetches the losses of many steps from the device at once."""
        every_process = self.trainer.runtime.gather(torch.stack(losses).tolist() if losses else [])
        self.trainer.losses.extend(sum(step) / len(step) for step in zip(*every_process, strict=True))

    def _stop(self, run: Path) -> None:
        trainer = self.trainer
        if trainer.runtime.is_main:
            trainer.save(run)
        trainer.runtime.wait_for_all()
        if not trainer.runtime.is_main:
            raise Stopped  # the main process tells it
        raise Stopped(
            f"stopped by a signal in epoch {trainer.epoch + 1} after step {trainer.step}; "
            f"go on with: ctseg train {run / RECIPE_FILE} --resume --output {run}"
        )

    def _step(self, batch: list[int]) -> Tensor:
        trainer, recipe, runtime = self.trainer, self.trainer.recipe, self.trainer.runtime
        seed = recipe.training.seed
        draws = draw_step(self.cases, batch, recipe.sampling, recipe.augmentation, seed, trainer.epoch)
        mine, share = _deal(draws, runtime)
        torch.manual_seed(int(generator(seed, NETWORK, trainer.epoch, trainer.step, runtime.rank).integers(2**31)))
        image_B1XYZ, label_B1XYZ = cut_batch(self.cases, mine, recipe.sampling, runtime.device)
        with runtime.autocast():
            logits = self.network(image_B1XYZ.contiguous(memory_format=torch.channels_last_3d))
        loss = self.loss(logits.float(), label_B1XYZ)
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.scaler.scale(loss * share).backward()  # type: ignore[no-untyped-call]
        trainer.scaler.step(trainer.optimizer)
        trainer.scaler.update()
        return loss.detach()


def _deal(draws: list[Draw], runtime: Runtime) -> tuple[list[Draw], float]:
    """This process's patches, and the weight that makes the mean over processes the mean over all patches."""
    mine = draws[runtime.rank :: runtime.world_size]
    return mine, len(mine) * runtime.world_size / len(draws)


def _finish_epoch(trainer: Trainer, model: Model, validation: list[CaseArrays], progress: Progress) -> Row:
    """Closes the epoch: checks the loss, validates if it is time, appends the row to the history."""
    training = trainer.recipe.training
    # In float16 a step may overflow now and then; the scaler has skipped it.
    losses = [v for v in trainer.losses if math.isfinite(v)] if trainer.scaler.is_enabled() else trainer.losses
    loss = sum(losses) / len(losses) if losses else math.nan
    if not math.isfinite(loss):
        raise CtsegError(f"training diverged: the loss of epoch {trainer.epoch + 1} is {loss}; lower optimizer.lr")
    trainer.epoch, trainer.step, trainer.losses = trainer.epoch + 1, 0, []
    due = trainer.epoch % training.validation_interval_epochs == 0 or trainer.epoch == training.epochs
    mean_dice = _validate(trainer, model, validation, progress) if due and validation else None
    lr = float(trainer.optimizer.param_groups[0]["lr"])
    row = {"epoch": trainer.epoch, "loss": loss, "mean_dice": mean_dice, "lr": lr}
    trainer.history.append(row)
    return row


def _validate(trainer: Trainer, model: Model, cases: list[CaseArrays], progress: Progress) -> float | None:
    """Mean Dice over all cases; each process takes its share of them, each case is counted once."""
    runtime = trainer.runtime
    mine = cases[runtime.rank :: runtime.world_size]
    runtime.copy_from_main(trainer.network.buffers())  # batch statistics: those that the checkpoint holds are scored
    trainer.network.eval()
    progress.start("validating", len(mine))
    values = []
    for case in mine:
        values.extend(bank_dice(model, case, trainer.recipe.training.validation_overlap))
        progress.advance(case.name)
    progress.finish()
    return mean_or_none([value for share in runtime.gather(values) for value in share])


def _keep(trainer: Trainer, row: Row, run: Path, recorder: Recorder) -> None:
    """The checkpoint last: killed before it, the epoch is repeated and gives the same weights and rows again."""
    if row is trainer.best:
        trainer.save_best(run, row)
    recorder.write(trainer.history)
    trainer.save(run)


def _detail(row: Row, best: Row | None) -> str:
    scored = "" if row["mean_dice"] is None else f"  validation Dice {row['mean_dice']:.4f}"
    return f"loss {row['loss']:.4f}{scored}" + (f"  best {best['mean_dice']:.4f}" if best else "")
