"""Networks, all from MONAI, built from a recipe's numbers."""

from __future__ import annotations

from torch import nn

from ctseg.recipe import Recipe, UNetSpec


def build_network(spec: UNetSpec, in_channels: int, out_channels: int) -> nn.Module:
    """A network `[B, in_channels, X, Y, Z]` -> `[B, out_channels, X, Y, Z]`; fresh weights, torch's current seed."""
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


def network_for(recipe: Recipe) -> nn.Module:
    """The recipe's network: one CT channel in, one score for each class out (background first)."""
    return build_network(recipe.network, in_channels=1, out_channels=recipe.num_classes)


def count_parameters(network: nn.Module) -> int:
    """Number of trainable values."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)
