"""Losses and optimizers, built from a recipe's numbers.

The losses are MONAI's DiceLoss and DiceCELoss on softmax scores, in value and gradient, written as sums over voxels:
so the processes of one training can add up their sums and get the loss of the whole batch. Sums are kept to full
precision (MONAI's own float32 sums over a batch of 96^3 patches are off by 4e-4; in float64 it gives our values).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ctseg.specs import AdamSpec, CosineSpec, DiceCESpec, DiceSpec, OptimizerSpec, ScheduleSpec, StepSpec

SMOOTH = 1e-5
"""Added to numerator and denominator of Dice, as in MONAI."""

Sums = tuple[Tensor, Tensor, Tensor]
Reduce = Callable[[Tensor], Tensor]
"""Adds a tensor of sums over all processes; the identity for one."""


@dataclass(frozen=True)
class SegmentationLoss:
    """Dice, or Dice plus cross entropy, of softmax scores: `loss(logits_BCXYZ, labels_B1XYZ)` is a scalar.

    A single score is the foreground's, that of the background is 0: softmax of both is the sigmoid.

    With `reduce`, value and denominators are those of all processes' patches together, while the gradient is that of
    this process's own patches: the sum of gradients over processes is the gradient of the whole batch's loss.
    """

    spec: DiceSpec | DiceCESpec

    def __call__(self, logits: Tensor, labels: Tensor, reduce: Reduce = lambda sums: sums) -> Tensor:
        """The loss as float32."""
        sums_of = _two_class_sums if logits.shape[1] <= 2 else _class_sums
        overlap_BC, volume_BC, cross_entropy = sums_of(logits, labels, self.spec.squared_pred)
        if not self.spec.include_background:
            overlap_BC, volume_BC = overlap_BC[:, 1:], volume_BC[:, 1:]
        counts = torch.cat([overlap_BC.new_full((1,), n) for n in (len(labels), labels.numel())])  # no copy to a GPU
        if self.spec.batch:
            sums = torch.cat([overlap_BC.sum(0), volume_BC.sum(0), cross_entropy[None], counts])
            *dice_sums, cross_entropy, _, voxels = reduce(sums).unbind()
            overlap, volume = torch.stack(dice_sums).chunk(2)
            dice_loss = (1 - (2 * overlap + SMOOTH) / (volume + SMOOTH)).mean()
        else:
            each = (1 - (2 * overlap_BC + SMOOTH) / (volume_BC + SMOOTH)).mean(1)
            sums = torch.cat([each.sum()[None], cross_entropy[None], counts])
            total, cross_entropy, patches, voxels = reduce(sums).unbind()
            dice_loss = total / patches
        loss = dice_loss + cross_entropy / voxels if isinstance(self.spec, DiceCESpec) else dice_loss
        return loss.float()


def _class_sums(logits: Tensor, labels: Tensor, squared: bool) -> Sums:
    """Overlap and volume (scores plus labels) of each patch and class, and the cross entropy's sum over all voxels."""
    log_scores = functional.log_softmax(logits.float(), dim=1)
    scores = log_scores.exp()
    cross_entropy = -_total(log_scores.gather(1, labels.long())).sum()
    overlap, volume = [], []
    for value in range(logits.shape[1]):
        score, is_value = scores[:, value], labels[:, 0] == value
        overlap.append(_total(score * is_value))
        volume.append(_total(score * score if squared else score) + _total(is_value.float()))
    return torch.stack(overlap, 1), torch.stack(volume, 1), cross_entropy


def _two_class_sums(logits: Tensor, labels: Tensor, squared: bool) -> Sums:
    """As `_class_sums`, in a third of the time: two scores are one sigmoid of their difference."""
    difference = logits[:, -1].float() - logits[:, 0].float() if logits.shape[1] == 2 else logits[:, 0].float()
    sums: Sums = _SigmoidSums.apply(difference, labels[:, 0].float(), squared)  # type: ignore[no-untyped-call]
    return sums


class _SigmoidSums(torch.autograd.Function):
    """The sums of `_two_class_sums` with their gradient written out: three arrays are kept instead of a dozen."""

    @staticmethod
    def forward(ctx: Any, difference: Tensor, label: Tensor, squared: bool) -> Sums:
        front, back = torch.sigmoid(difference), torch.sigmoid(-difference)  # 1 - front would lose small values
        other = 1 - label
        overlap = torch.stack([_dot(back, other), _dot(front, label)], 1)
        scores = [_dot(back, back), _dot(front, front)] if squared else [_total(back), _total(front)]
        volume = torch.stack([scores[0] + _total(other), scores[1] + _total(label)], 1)
        cross_entropy = (_total(functional.softplus(difference)) - _dot(label, difference)).sum()
        ctx.save_for_backward(front, back, label)
        ctx.squared = squared
        return overlap, volume, cross_entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        front, back, label = ctx.saved_tensors
        overlap_BC, volume_BC, cross_entropy = (g.float() for g in grads)
        overlap = overlap_BC.view(len(front), 2, 1, 1, 1).unbind(1)
        volume = volume_BC.view(len(front), 2, 1, 1, 1).unbind(1)
        # Of each class's score, front minus back, times the sigmoid's slope.
        grad = label * (overlap[0] + overlap[1]) - overlap[0]
        if ctx.squared:
            grad.addcmul_(front, 2 * volume[1]).addcmul_(back, -2 * volume[0])
        else:
            grad += volume[1] - volume[0]
        grad.mul_(front).mul_(back)
        return grad.add_((front - label).mul_(cross_entropy)), None, None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products over each patch, float64; in rows, as a single float32 sum over a patch would drift."""
    products: Tensor = torch.linalg.vecdot(a.flatten(2), b.flatten(2))
    return products.sum(1, dtype=torch.float64)


def _total(values: Tensor) -> Tensor:
    """Sum over each patch, float64."""
    return values.flatten(2).sum(2).sum(1, dtype=torch.float64)


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
