"""The state of a training: what changes from step to step, how it is saved and where it goes on from.

Everything random is a function of the seed and the place in the training (see `sampling`), so there are no random
states to save, for any number of processes. All else that the next step depends on stands in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ctseg.engine.checkpoint import BEST, LAST, keep_previous, read_checkpoint, read_newest, save_checkpoint
from ctseg.engine.parallel import globalise
from ctseg.engine.runtime import Runtime
from ctseg.engine.weights import check_freeze
from ctseg.errors import ModelError
from ctseg.networks import channels_last, network_for, tune_for_training
from ctseg.objectives import build_optimizer
from ctseg.recipe import Recipe, recipe_from_dict
from ctseg.workspace import START

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
    average: AveragedModel | None
    """The moving average of the weights, where the recipe asks for one."""
    data: str = ""
    """Fingerprint of the prepared cases."""
    patches_per_pass: int | None = None
    """Patches that one process sends through the network at once; None for all of a step."""
    epoch: int = 0
    """Epochs done."""
    step: int = 0
    """Steps done in the running epoch."""
    losses: list[float] = field(default_factory=list)
    """Loss of each step done in the running epoch, over all processes' patches."""
    history: list[Row] = field(default_factory=list)
    changed: bool = False
    """The last checkpoint is of another recipe or other cases."""
    best_recipe: Recipe | None = None
    """Of the last checkpoint, if that is another one."""
    fell_back: bool = False
    """The last checkpoint is damaged, and training goes on from the one before."""

    @classmethod
    def fresh(cls, recipe: Recipe, runtime: Runtime, data: str = "") -> Trainer:
        """A training at its first step; the weights follow from the recipe's seed."""
        torch.manual_seed(recipe.training.seed)
        network = tune_for_training(globalise(network_for(recipe), runtime), runtime.device)
        channels_last(network).to(runtime.device)
        for name in check_freeze(recipe.training.freeze, network):
            network.get_parameter(name).requires_grad_(False)
        scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.amp_dtype is torch.float16)
        decay = recipe.training.ema_decay
        average = None if decay is None else moving_average(network, decay)
        optimizer = build_optimizer(recipe.optimizer, (p for p in network.parameters() if p.requires_grad))
        passes = recipe.training.patches_per_pass
        return cls(recipe, runtime, network, optimizer, scaler, average, data, passes)

    @property
    def best(self) -> Row | None:
        """The epoch with the highest validation Dice, the first of equals."""
        validated = [row for row in self.history if row["mean_dice"] is not None]
        return max(validated, key=lambda row: row["mean_dice"], default=None)

    @property
    def model(self) -> nn.Module:
        """The network that is validated and kept: the average where there is one."""
        averaged: nn.Module = self.network if self.average is None else self.average.module
        return averaged

    @property
    def finished(self) -> bool:
        """True after the last epoch, or when the validation has not risen for the recipe's number of epochs."""
        training = self.recipe.training
        patience, best = training.early_stop_epochs, self.best
        just_validated = bool(self.history) and self.history[-1]["mean_dice"] is not None
        stalled = patience is not None and best is not None and self.epoch - best["epoch"] >= patience
        return self.epoch >= training.epochs or (just_validated and stalled)

    def save(self, run: Path) -> None:
        """Writes the checkpoint to go on from; the one before it is kept too."""
        content = {
            "recipe": self.recipe.to_dict(),
            "data": self.data,
            "model": self.network.state_dict(),
            "average": None if self.average is None else self.average.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "patches_per_pass": self.patches_per_pass,
            "epoch": self.epoch,
            "step": self.step,
            "losses": self.losses,
            "history": self.history,
        }
        if not self.fell_back:  # else the last one is damaged, and the previous one is all there is
            keep_previous(run)
        save_checkpoint(run / LAST, content)
        self.fell_back = False

    def save_best(self, run: Path, row: Row) -> None:
        """Writes the weights of the best epoch so far."""
        self._save_best(run, row, self.recipe)

    def _save_best(self, run: Path, row: Row, recipe: Recipe) -> None:
        save_checkpoint(run / BEST, {"recipe": recipe.to_dict(), "model": self.model.state_dict(), **row})

    def load(self, run: Path, *, changed: bool = False) -> str:
        """Goes to where `save` left off, or takes the weights that a fine-tuning starts with; returns a warning or "".

        With `changed` the run may have been trained with another recipe or other cases until now; the network must be
        the same, and another kind of optimizer starts anew.

        Raises:
            ModelError: if the checkpoints are damaged or do not belong to this recipe and these cases.
        """
        content, warning = read_newest(run)
        self.fell_back = bool(warning)
        if content is None:
            if (run / START).exists():
                self._take_weights(read_checkpoint(run / START), run / START)
            return warning
        before = recipe_from_dict(content.get("recipe"), f"recipe inside the checkpoint of run '{run}'")
        changed = changed and (before != self.recipe or content.get("data") != self.data)
        if not changed:
            self._compare(before, content.get("data"), run)
        self.changed, self.best_recipe = changed, before if changed else None
        if "model" not in content:
            raise ModelError(f"checkpoint of run '{run}': incomplete or damaged")
        self._take_weights(content, run)
        freeze = self.recipe.training.freeze
        try:
            if before.optimizer.kind == self.recipe.optimizer.kind and set(before.training.freeze) == set(freeze):
                self.optimizer.load_state_dict(content["optimizer"])
            if content["scaler"]:  # empty when saved without mixed precision
                self.scaler.load_state_dict(content["scaler"])
            if before.training.patches_per_pass == self.recipe.training.patches_per_pass:
                self.patches_per_pass = content["patches_per_pass"]
            self.epoch, self.history = content["epoch"], content["history"]
            if not changed:  # else the running epoch, whose order of cases may differ, begins anew
                self.step, self.losses = content["step"], content["losses"]
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise ModelError(f"checkpoint of run '{run}': incomplete or damaged") from error
        return warning

    def repair_best(self, run: Path) -> None:
        """Writes the best epoch's weights again if it is the one just loaded: a kill may have come before them."""
        best = self.best
        if best is not None and best["epoch"] == self.epoch and self.step == 0:
            self._save_best(run, best, self.best_recipe or self.recipe)  # that which its weights were trained with

    def _compare(self, before: Recipe, data: Any, run: Path) -> None:
        if before != self.recipe:
            raise ModelError(
                f"checkpoint of run '{run}': written by another recipe than this run's; add --change-recipe to go on "
                f"with this one"
            )
        if data != self.data:
            raise ModelError(
                f"run '{run}': its prepared cases have changed since; bring back the old files, start a new run, or "
                f"add --change-recipe to go on with the new ones"
            )

    def _take_weights(self, content: dict[str, Any], path: Path) -> None:
        """The network's weights, and the average's: that of the checkpoint, else it starts with these weights."""
        try:
            self.network.load_state_dict(content["model"])
            if self.average is not None:
                self.average.module.load_state_dict(content.get("average") or content["model"])
                self.average.n_averaged.fill_(1)
        except (KeyError, RuntimeError, TypeError, AttributeError) as error:
            raise ModelError(f"checkpoint of '{path}': its weights do not fit the recipe's network") from error


def moving_average(network: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the network's weights and batch statistics."""
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)  # type: ignore[no-untyped-call]


def train_mode(network: nn.Module, prefixes: Iterable[str]) -> None:
    """Training mode for all but the frozen modules, whose batch statistics stand still too."""
    network.train()
    for name, module in network.named_modules():
        if f"{name}.".startswith(tuple(prefixes)):
            module.train(False)
