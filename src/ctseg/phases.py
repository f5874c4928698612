"""A UNet's finest level computed on the grid below it: the same sums in a fraction of a CPU's time.

A transposed convolution of stride 2 makes eight voxels of each voxel, one for each of its eight halves, or phases. Each
phase is an ordinary convolution of the coarse grid, so that all eight are one of eight times as many channels; and a
convolution of the fine grid is one of the phases. CPU kernels compute channels by 16: two channels on the fine
grid leave most of that idle, two times eight phases on the coarse one fill it.

Channels of phases are ordered [C, 2, 2, 2]: the halves along X, Y, Z of each channel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

PHASES = 8


def finest_level_in_phases(network: nn.Module) -> nn.Module:
    """The network itself, with the last block of MONAI's UNet replaced, where it is one that this is known for.

    Call it after `networks.fold_for_inference`. The answer is the same to float32 rounding; of two classes it is one
    channel, the second one's logit minus the first one's.
    """
    blocks = getattr(network, "model", None)
    last = blocks[-1] if isinstance(blocks, nn.Sequential) else None
    if isinstance(blocks, nn.Sequential) and isinstance(last, nn.Sequential) and len(last) == 2 and _is_known(*last):
        up, residual = last
        blocks[-1] = _FinestLevel(up.conv, up.adn.A, residual.conv.unit0.conv)  # type: ignore[arg-type,union-attr]  # as `_is_known` says
    return network


class _FinestLevel(nn.Module):
    """A transposed convolution, an activation, and a convolution whose input is added to its output."""

    def __init__(self, up: nn.ConvTranspose3d, activation: nn.Module, last: nn.Conv3d) -> None:
        super().__init__()
        self.up = _convolution(kernel_of_phases(up.weight), up.bias)
        self.activation = activation
        self.differs = len(last.weight) == 2
        weight, bias = (_difference(v) if self.differs and v is not None else v for v in (last.weight, last.bias))
        assert weight is not None
        self.last = _convolution(kernel_between_phases(weight), bias, padding=1)

    def forward(self, coarse_BCXYZ: Tensor) -> Tensor:
        """`[B, C, X, Y, Z]` to the fine grid, twice as many voxels along each axis."""
        phases: Tensor = self.activation(self.up(functional.pad(coarse_BCXYZ, (0, 1) * 3)))
        added = phases[:, PHASES:] - phases[:, :PHASES] if self.differs else phases
        return to_fine_grid(self.last(phases) + added)


def _difference(values: Tensor) -> Tensor:
    return values[1:] - values[:1]


def kernel_of_phases(weight_IOXYZ: Tensor) -> Tensor:
    """The kernel `[8 O, I, 2, 2, 2]` of the phases of a transposed convolution of stride 2, kernel 3, padding 1.

    Its voxel 2 q + phase is the sum over a of input q + a with weight phase + 1 - 2 a.
    """
    along = torch.zeros(2, 2, 3)
    for phase, a in ((0, 0), (1, 0), (1, 1)):
        along[phase, a, phase + 1 - 2 * a] = 1
    kernel = torch.einsum("ioxyz,pax,qby,rcz->opqriabc", weight_IOXYZ, along, along, along)
    return kernel.flatten(0, 3)


def kernel_between_phases(weight_OIXYZ: Tensor) -> Tensor:
    """The kernel `[8 O, 8 I, 3, 3, 3]` that does on phases what a convolution with kernel 3, padding 1 does on voxels.

    Voxel 2 q + phase reads voxel 2 (q + b) + other, its neighbour at 2 b + other - phase.
    """
    along = torch.zeros(2, 2, 3, 3)
    for phase in (0, 1):
        for other in (0, 1):
            for b in (-1, 0, 1):
                neighbour = 2 * b + other - phase
                if abs(neighbour) <= 1:
                    along[phase, other, b + 1, neighbour + 1] = 1
    kernel = torch.einsum("oixyz,psax,qtby,rucz->opqristuabc", weight_OIXYZ, along, along, along)
    return kernel.flatten(0, 3).flatten(1, 4)


def to_fine_grid(phases_BCXYZ: Tensor) -> Tensor:
    """`[B, 8 C, X, Y, Z]` to `[B, C, 2 X, 2 Y, 2 Z]`."""
    batch, channels, *size = phases_BCXYZ.shape
    halves = phases_BCXYZ.reshape(batch, channels // PHASES, 2, 2, 2, *size)
    x, y, z = (2 * n for n in size)
    return halves.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(batch, channels // PHASES, x, y, z)


def _convolution(kernel: Tensor, bias: Tensor | None, padding: int = 0) -> nn.Conv3d:
    out_channels, in_channels, *size = kernel.shape
    convolution = nn.Conv3d(in_channels, out_channels, tuple(size), padding=padding, bias=bias is not None)  # type: ignore[arg-type]  # three of them
    with torch.no_grad():
        convolution.weight.copy_(kernel)
        if bias is not None and convolution.bias is not None:
            convolution.bias.copy_(bias.repeat_interleave(PHASES))
    return convolution


def _is_known(up: nn.Module, residual: nn.Module) -> bool:
    transposed, adn = getattr(up, "conv", None), getattr(up, "adn", None)
    units = getattr(residual, "conv", None)
    last = getattr(getattr(units, "unit0", None), "conv", None)
    return (
        isinstance(transposed, nn.ConvTranspose3d)
        and _is(transposed, kernel=3, stride=2, padding=1)
        and transposed.output_padding == (1, 1, 1)
        and isinstance(getattr(adn, "N", nn.Identity()), nn.Identity)
        and isinstance(getattr(adn, "D", nn.Identity()), nn.Identity | nn.Dropout)
        and isinstance(getattr(adn, "A", None), nn.LeakyReLU)
        and isinstance(units, nn.Sequential)
        and len(units) == 1
        and isinstance(last, nn.Conv3d)
        and _is(last, kernel=3, stride=1, padding=1)
        and not hasattr(units.unit0, "adn")
        and isinstance(getattr(residual, "residual", None), nn.Identity)
    )


def _is(convolution: nn.Conv3d | nn.ConvTranspose3d, kernel: int, stride: int, padding: int) -> bool:
    wanted = ((kernel,) * 3, (stride,) * 3, (padding,) * 3, (1, 1, 1), 1)
    has = (convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
    return has == wanted
