"""Losses and optimizers, from MONAI and PyTorch, built from a recipe's numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ctseg.recipe import AdamSpec, DiceCESpec, DiceSpec, NovogradSpec

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


def build_optimizer(spec: NovogradSpec | AdamSpec, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The recipe's optimizer at its base learning rate, default betas."""
    if isinstance(spec, AdamSpec):
        return torch.optim.Adam(parameters, lr=spec.lr)
    from monai.optimizers.novograd import Novograd

    optimizer: torch.optim.Optimizer = Novograd(parameters, lr=spec.lr)
    return optimizer
