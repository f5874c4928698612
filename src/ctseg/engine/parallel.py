"""Layers that see the whole batch when each process holds a part of it.

With them a training on several processes is the training on one, to float rounding: batch statistics and dropped
channels are those of all patches of a pass together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn

from ctseg.engine.runtime import Runtime

Rows = slice
"""Which patches of a pass are this process's own."""


class _Sum(torch.autograd.Function):
    """Adds a tensor over all processes, and its gradient likewise."""

    @staticmethod
    def forward(_ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        distributed.all_reduce(total)
        return total


def _add_up(values: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(values)  # type: ignore[no-untyped-call]
    return total


class GlobalBatchNorm(nn.BatchNorm3d):
    """Batch normalisation over all processes' patches, on any device; torch's SyncBatchNorm knows only CUDA."""

    def forward(self, image_BCXYZ: Tensor) -> Tensor:
        """The normalised image; in training mode every process must call it at once."""
        if not self.training:
            return super().forward(image_BCXYZ)
        over = (0, 2, 3, 4)
        count = torch.tensor(float(image_BCXYZ.numel() / image_BCXYZ.shape[1]), device=image_BCXYZ.device)
        distributed.all_reduce(count)
        values = image_BCXYZ.float()
        mean = _add_up(values.sum(over)) / count
        centred = values - mean.view(1, -1, 1, 1, 1)
        variance = _add_up(centred.square().sum(over)) / count
        self._keep(mean.detach(), variance.detach() * count / (count - 1))
        scale = (variance + self.eps).rsqrt() * self.weight
        result: Tensor = torch.addcmul(self.bias.view(1, -1, 1, 1, 1), centred, scale.view(1, -1, 1, 1, 1))
        return result.to(image_BCXYZ.dtype)

    def _keep(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
        self.num_batches_tracked += 1


class GlobalDropout(nn.Dropout3d):
    """Channel dropout whose mask is drawn for all patches of a pass, whichever process holds them."""

    patches = 1
    """In the whole pass."""
    rows = Rows(None)

    def forward(self, image_BCXYZ: Tensor) -> Tensor:
        """The image with some channels at zero, the others scaled up, in training mode."""
        if not self.training:
            return image_BCXYZ
        keep = 1 - self.p
        mask = torch.rand(self.patches, image_BCXYZ.shape[1]) < keep  # on the host: the same numbers on every device
        factors = (mask[self.rows].to(image_BCXYZ.dtype) / keep).to(image_BCXYZ.device, non_blocking=True)
        return image_BCXYZ * factors[:, :, None, None, None]


def globalise(network: nn.Module, runtime: Runtime) -> nn.Module:
    """The network with its layers that see a batch replaced by global ones; weights and their names stay."""
    if runtime.world_size > 1 and runtime.device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    for module in network.modules():
        if type(module) is nn.BatchNorm3d and runtime.world_size > 1:
            module.__class__ = GlobalBatchNorm
        elif type(module) is nn.Dropout3d:
            module.__class__ = GlobalDropout
    return network


def begin_pass(network: nn.Module, patches: int, rows: Rows) -> None:
    """Tells the network's layers which rows of a pass of so many patches this process holds."""
    for module in network.modules():
        if isinstance(module, GlobalDropout):
            module.patches, module.rows = patches, rows
