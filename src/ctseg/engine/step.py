"""One optimisation step: patches are drawn, dealt out to processes and passes, and their gradients added up.

The batch of the recipe is the batch of all processes together. A step goes through the network in one pass, or, where
memory is short, in several whose gradients are accumulated. Batch statistics and the sums of the Dice term run over
one pass: over all its patches, on whichever process they are.
"""

from __future__ import annotations

import math
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ctseg.clicks import simulate_clicks
from ctseg.engine.parallel import Rows, begin_pass
from ctseg.engine.runtime import Runtime
from ctseg.engine.trainer import Trainer, train_mode
from ctseg.errors import CtsegError
from ctseg.objectives import SegmentationLoss, learning_rate
from ctseg.sampling import CLICKS, NETWORK, CaseArrays, Draw, cut_batch, draw_step, epoch_batches, generator
from ctseg.specs import ClicksSpec


@dataclass(frozen=True)
class Pass:
    """A part of a step that goes through the network at once."""

    draws: list[Draw]
    """The patches of all processes."""
    first: int
    """Number of its first patch in the step."""
    share: float
    """Of the whole step's patches."""
    last: bool


class Stepper:
    """Runs the optimisation steps of a training on its prepared cases."""

    def __init__(self, trainer: Trainer, cases: list[CaseArrays]) -> None:
        self.trainer = trainer
        self.cases = cases
        self.loss = SegmentationLoss(trainer.recipe.objective)
        check_shares(trainer, len(cases))
        self.network = _distributed(trainer.network) if trainer.runtime.world_size > 1 else trainer.network

    def batches(self) -> list[list[int]]:
        """The running epoch's steps, each a list of case indices."""
        training, weights = self.trainer.recipe.training, [case.weight for case in self.cases]
        return epoch_batches(weights, training.batch_cases, training.seed, self.trainer.epoch)

    def begin_epoch(self) -> None:
        """Puts the network into training mode."""
        train_mode(self.trainer.network, self.trainer.recipe.training.freeze)

    def step(self, batch: list[int], steps_per_epoch: int) -> Tensor:
        """One step on the cases of `batch`; returns its loss over all processes' patches, still on the device."""
        trainer, recipe, runtime = self.trainer, self.trainer.recipe, self.trainer.runtime
        seed, place = recipe.training.seed, (trainer.epoch, trainer.step)
        self._set_rate(trainer.epoch * steps_per_epoch + trainer.step, steps_per_epoch)
        draws = draw_step(self.cases, batch, recipe.sampling, recipe.augmentation, seed, place)
        torch.manual_seed(int(generator(seed, NETWORK, *place).integers(2**31)))  # the same on every process
        trainer.optimizer.zero_grad(set_to_none=True)
        losses = [self._pass(part) for part in passes(draws, runtime, trainer.patches_per_pass)]
        if recipe.training.gradient_clip_norm is not None:
            trainer.scaler.unscale_(trainer.optimizer)
            nn.utils.clip_grad_norm_(trainer.network.parameters(), recipe.training.gradient_clip_norm)
        trainer.scaler.step(trainer.optimizer)
        trainer.scaler.update()
        if trainer.average is not None:
            trainer.average.update_parameters(trainer.network)
        return torch.stack(losses).sum()

    def _pass(self, part: Pass) -> Tensor:
        runtime = self.trainer.runtime
        rows = Rows(runtime.rank, None, runtime.world_size)
        begin_pass(self.trainer.network, len(part.draws), rows)
        image, label = cut_batch(self.cases, part.draws[rows], self.trainer.recipe.sampling, runtime.device)
        if self.trainer.recipe.clicks is not None:
            numbers = range(part.first, part.first + len(part.draws))[rows]
            image = self._with_clicks(image, label, self.trainer.recipe.clicks, numbers)
        with self._gradients(part.last):
            with runtime.autocast():
                logits = self.network(image.contiguous(memory_format=torch.channels_last_3d))
            loss: Tensor = self.loss(logits, label, runtime.add_up) * part.share
            # Gradients are averaged over processes, but each holds a part of the sum.
            self.trainer.scaler.scale(loss * runtime.world_size).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _with_clicks(self, image: Tensor, label: Tensor, spec: ClicksSpec, numbers: range) -> Tensor:
        """The network's input with simulated clicks; `numbers` are those of the patches in the step."""
        trainer, training = self.trainer, self.trainer.recipe.training
        rngs = [generator(training.seed, CLICKS, trainer.epoch, trainer.step, number) for number in numbers]
        trainer.network.eval()
        with_clicks = simulate_clicks(image, label, self._logits, spec, rngs)
        train_mode(trainer.network, training.freeze)
        return with_clicks

    def _logits(self, image: Tensor) -> Tensor:
        with torch.inference_mode(), self.trainer.runtime.autocast():
            logits: Tensor = self.trainer.network(image.contiguous(memory_format=torch.channels_last_3d))
        return logits

    def _gradients(self, last: bool) -> AbstractContextManager[None]:
        """Processes exchange gradients in the last pass of a step only."""
        wait = isinstance(self.network, DistributedDataParallel) and not last
        return self.network.no_sync() if wait else nullcontext()  # type: ignore[operator,no-any-return,unused-ignore]

    def _set_rate(self, step: int, steps_per_epoch: int) -> None:
        recipe = self.trainer.recipe
        lr = learning_rate(recipe.schedule, recipe.optimizer.lr, step, steps_per_epoch, recipe.training.epochs)
        for group in self.trainer.optimizer.param_groups:
            group["lr"] = lr


def passes(draws: list[Draw], runtime: Runtime, patches_per_pass: int | None) -> list[Pass]:
    """A step's patches in passes of nearly equal size, in each of which every process has at least one patch."""
    wanted = math.ceil(len(draws) / ((patches_per_pass or len(draws)) * runtime.world_size))
    number = max(1, min(wanted, len(draws) // runtime.world_size))
    borders = [len(draws) * n // number for n in range(number + 1)]
    parts = [draws[a:b] for a, b in pairwise(borders)]
    return [
        Pass(part, first, len(part) / len(draws), last=n == number - 1)
        for n, (part, first) in enumerate(zip(parts, borders, strict=False))
    ]


def check_shares(trainer: Trainer, num_cases: int) -> None:
    """Every process needs a patch in every step, the epoch's last and smallest one included.

    Raises:
        CtsegError: if there are more processes than that.
    """
    recipe, processes = trainer.recipe, trainer.runtime.world_size
    cases = num_cases % recipe.training.batch_cases or recipe.training.batch_cases
    patches = min(cases, num_cases) * recipe.sampling.patches_per_case
    if patches < processes:
        raise CtsegError(
            f"{processes} processes, but the smallest step of an epoch has only {patches} patches; use fewer, "
            f"or raise training.batch_cases or sampling.patches_per_case"
        )


def _distributed(network: nn.Module) -> nn.Module:
    # A 1x1x1 kernel's strides are ambiguous; the notice concerns a few hundred bytes.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return DistributedDataParallel(network)
