"""Group normalisation that leaves the order of memory alone.

OpenVINO reshapes an image into its groups, and for that turns it from channels last, which convolutions want, into
channels first and back again. Its statistics can be had without: from those of each channel.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

BLOCK = 8
"""Voxels along each axis."""


class ChannelwiseGroupNorm(nn.Module):
    """`nn.GroupNorm` as a scale and an offset for each channel; the same values to rounding.

    A group's mean is that of its channels' means; its variance is the mean of their variances plus the variance of
    their means.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.epsilon = norm.num_groups, norm.eps
        self.weight = nn.Parameter(norm.weight.detach() if norm.affine else torch.ones(norm.num_channels))
        self.bias = nn.Parameter(norm.bias.detach() if norm.affine else torch.zeros(norm.num_channels))

    def forward(self, image_BCXYZ: Tensor) -> Tensor:
        """The image normalised over each group of channels."""
        mean_BC = _mean(image_BCXYZ)
        variance_BC = _mean((image_BCXYZ - mean_BC).square())
        in_groups = (mean_BC.shape[0], self.groups, -1)
        means_BGN, variances_BGN = mean_BC.reshape(in_groups), variance_BC.reshape(in_groups)
        mean_BG = means_BGN.mean(2, keepdim=True)
        variance_BG = (variances_BGN + (means_BGN - mean_BG).square()).mean(2, keepdim=True)
        scale_BGN = self.weight.reshape(1, self.groups, -1) * torch.rsqrt(variance_BG + self.epsilon)
        offset_BGN = self.bias.reshape(1, self.groups, -1) - mean_BG * scale_BGN
        return image_BCXYZ * scale_BGN.reshape(mean_BC.shape) + offset_BGN.reshape(mean_BC.shape)


def _mean(image_BCXYZ: Tensor) -> Tensor:
    """Of each channel, first of blocks and then of their means: some libraries add up millions of values one by one."""
    if all(n % BLOCK == 0 for n in image_BCXYZ.shape[2:]):
        image_BCXYZ = nn.functional.avg_pool3d(image_BCXYZ, BLOCK)
    return image_BCXYZ.mean((2, 3, 4), keepdim=True)


def with_channelwise_group_norms(network: nn.Module) -> nn.Module:
    """A copy of a 3D network with every `nn.GroupNorm` replaced; the network itself if it has none."""
    if not any(type(module) is nn.GroupNorm for module in network.modules()):
        return network
    changed = copy.deepcopy(network)
    for module in list(changed.modules()):
        for name, child in module.named_children():
            if type(child) is nn.GroupNorm:
                setattr(module, name, ChannelwiseGroupNorm(child))
    return changed
