"""Losses and optimizers, from MONAI and PyTorch, built from a recipe's numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ctseg.specs import AdamSpec, CosineSpec, DiceCESpec, DiceSpec, OptimizerSpec, ScheduleSpec, StepSpec

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits_BCXYZ float32, labels_B1XYZ integers) -> scalar."""


def build_loss(spec: DiceSpec | DiceCESpec) -> Loss:
    """MONAI's loss on softmax scores, with the recipe's options."""
    from monai.losses.dice import DiceCELoss, DiceLoss

    loss_class = DiceCELoss if isinstance(spec, DiceCESpec) else DiceLoss
    loss: Loss = loss_class(
        include_background=spec.include_background,
        to_onehot_y=True,
        softmax=True,
        squared_pred=spec.squared_pred,
        batch=spec.batch,
    )
    return loss


def build_optimizer(spec: OptimizerSpec, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The recipe's optimizer at its base learning rate, default betas."""
    if isinstance(spec, AdamSpec):
        return torch.optim.Adam(parameters, lr=spec.lr)
    from monai.optimizers.novograd import Novograd

    optimizer: torch.optim.Optimizer = Novograd(parameters, lr=spec.lr)
    return optimizer


def learning_rate(spec: ScheduleSpec, base_lr: float, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The rate of one optimisation step, counted from 0 over the whole training of `epochs` epochs.

    The warm-up's straight line reaches the schedule's own value with the last step of `warmup_epochs`.
    """
    warmup, total = spec.warmup_epochs * steps_per_epoch, epochs * steps_per_epoch
    factor = 1.0
    if isinstance(spec, StepSpec):
        factor = spec.gamma ** (step // steps_per_epoch // spec.step_epochs)
    elif isinstance(spec, CosineSpec):
        done = min(max(step - warmup, 0) / max(total - warmup, 1), 1.0)
        factor = spec.final_fraction + (1 - spec.final_fraction) * (1 + math.cos(math.pi * done)) / 2
    return base_lr * factor * min((step + 1) / warmup if warmup else 1.0, 1.0)
