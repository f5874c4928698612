"""Networks, all from MONAI, built from a recipe's numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ctseg.recipe import Recipe
from ctseg.specs import AHNetSpec, BasicUNetSpec, NetworkSpec, SegResNetSpec, UNetSpec


def build_network(spec: NetworkSpec, in_channels: int, out_channels: int) -> nn.Module:
    """A network `[B, in_channels, X, Y, Z]` -> `[B, out_channels, X, Y, Z]`; fresh weights, torch's current seed."""
    builders: dict[type, Callable[..., nn.Module]] = {
        UNetSpec: _unet,
        AHNetSpec: _ahnet,
        SegResNetSpec: _segresnet,
        BasicUNetSpec: _basic_unet,
    }
    return builders[type(spec)](spec, in_channels, out_channels)


def _unet(spec: UNetSpec, in_channels: int, out_channels: int) -> nn.Module:
    from monai.networks.nets.unet import UNet

    network: nn.Module = UNet(
        spatial_dims=3,
        in_channels=in_channels,
        out_channels=out_channels,
        channels=spec.channels,
        strides=spec.strides,
        num_res_units=spec.num_res_units,
        norm=spec.norm,
    )
    return network


def _ahnet(spec: AHNetSpec, in_channels: int, out_channels: int) -> nn.Module:
    from monai.networks.nets.ahnet import AHNet

    network: nn.Module = AHNet(
        layers=spec.layers,
        spatial_dims=3,
        in_channels=in_channels,
        out_channels=out_channels,
        psp_block_num=spec.psp_block_num,
        upsample_mode=spec.upsample_mode,
    )
    return network


def _segresnet(spec: SegResNetSpec, in_channels: int, out_channels: int) -> nn.Module:
    from monai.networks.nets.segresnet import SegResNet

    network: nn.Module = SegResNet(
        spatial_dims=3,
        init_filters=spec.init_filters,
        in_channels=in_channels,
        out_channels=out_channels,
        dropout_prob=spec.dropout_prob or None,
        blocks_down=spec.blocks_down,
        blocks_up=spec.blocks_up,
    )
    return network


def _basic_unet(spec: BasicUNetSpec, in_channels: int, out_channels: int) -> nn.Module:
    from ctseg.slices import BasicUNet, SliceUNet

    kind = SliceUNet if spec.dimensions == 2 else BasicUNet
    network: nn.Module = kind(spec.dimensions, in_channels, out_channels, spec.features)
    return network


def network_for(recipe: Recipe) -> nn.Module:
    """The recipe's network: a CT in, one score for each class out (background first); with clicks see `Recipe`."""
    return build_network(recipe.network, recipe.input_channels, recipe.output_channels)


def channels_last(network: nn.Module) -> nn.Module:
    """The network with its weights in the order of memory that suits 3D or 2D convolutions."""
    is_2d = any(parameter.ndim == 4 for parameter in network.parameters())
    layout = torch.channels_last if is_2d else torch.channels_last_3d
    return network.to(memory_format=layout)  # type: ignore[call-overload,no-any-return]  # stubs lack it


def fold_for_inference(network: nn.Module) -> nn.Module:
    """The network itself, changed to need less memory and time for the same answer (to float32 rounding).

    Batch normalisation with fixed statistics becomes part of the convolution before it, and an activation with one
    slope works in place. The network cannot be trained any more.
    """
    network.eval()
    for block in network.modules():
        convolution, adn = getattr(block, "conv", None), getattr(block, "adn", None)
        if not isinstance(convolution, nn.Conv3d | nn.ConvTranspose3d) or adn is None:
            continue
        if isinstance(getattr(adn, "N", None), nn.BatchNorm3d):
            transposed = isinstance(convolution, nn.ConvTranspose3d)
            block.conv = fuse_conv_bn_eval(convolution, adn.N, transposed)
            adn.N = nn.Identity()
        if isinstance(getattr(adn, "A", None), nn.PReLU) and adn.A.num_parameters == 1:
            adn.A = nn.LeakyReLU(adn.A.weight.item(), inplace=True)
    return network


def tune_for_training(network: nn.Module, device: torch.device) -> nn.Module:
    """The network with the same answers and gradients, faster and safer on a CPU; weights and their names stay.

    PyTorch's gradient of a PReLU takes a fifth of a UNet's training step there, and that of a convolution's weights may
    be wrong in bfloat16, see `_Safe`.
    """
    if device.type != "cpu":
        return network
    for module in network.modules():
        if type(module) is nn.PReLU and module.num_parameters == 1:
            module.__class__ = OneSlopePReLU
        elif type(module) in SAFE:
            module.__class__ = SAFE[type(module)]
    return network


class _Safe(nn.Module):
    """A convolution that leaves bfloat16 where an axis of the image is shorter than its kernel.

    There parts of the weights' gradient may hold whatever was in memory before (torch 2.13, oneDNN's kernels for
    AVX-512's bfloat16; answers and the image's gradient are right). Most such images are small.
    """

    kernel_size: tuple[int, ...]

    def forward(self, image: Tensor, *more: Any) -> Tensor:
        """The convolution, in float32 where bfloat16 is not safe."""
        convolve: Callable[..., Tensor] = super().forward
        if not _is_unsafe(image, self.kernel_size):
            return convolve(image, *more)
        with torch.autocast("cpu", enabled=False):
            return convolve(image.float(), *more)


class SafeConv2d(_Safe, nn.Conv2d):
    """See `_Safe`."""


class SafeConv3d(_Safe, nn.Conv3d):
    """See `_Safe`."""


class SafeConvTranspose3d(_Safe, nn.ConvTranspose3d):
    """See `_Safe`."""


SAFE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: SafeConv2d,
    nn.Conv3d: SafeConv3d,
    nn.ConvTranspose3d: SafeConvTranspose3d,
}
"""What takes the place of what in a training on a CPU."""


def _is_unsafe(image: Tensor, kernel_size: tuple[int, ...]) -> bool:
    """Whether gradients will be wanted of a convolution in reduced precision of so few voxels."""
    is_reduced = torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
    size = image.shape[-len(kernel_size) :]
    return is_reduced and any(n < kernel for n, kernel in zip(size, kernel_size, strict=True))


class OneSlopePReLU(nn.PReLU):
    """PReLU with one slope for all channels: a leaky ReLU whose slope is trained."""

    def forward(self, image: Tensor) -> Tensor:
        """The image with values below 0 multiplied by the slope."""
        result: Tensor = _LeakyReLU.apply(image, self.weight)  # type: ignore[no-untyped-call]
        return result


class _LeakyReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(image, slope)
        return functional.leaky_relu(image, slope.item())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        image, slope = ctx.saved_tensors
        image_grad = torch.ops.aten.leaky_relu_backward(grads[0], image, slope.item(), False)
        slope_grad = (grads[0] * image.clamp(max=0)).sum(dtype=torch.float32)
        return image_grad, slope_grad.to(slope.dtype).view_as(slope)


def count_parameters(network: nn.Module) -> int:
    """Number of trainable values."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)
