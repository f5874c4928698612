"""A UNet whose finest level is computed in phases gives the same answer."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from ctseg.networks import fold_for_inference, network_for
from ctseg.phases import (
    finest_level_in_phases,
    kernel_between_phases,
    kernel_of_phases,
    to_fine_grid,
)
from ctseg.recipe import load_recipe

SIZE = (5, 4, 7)


def seeded(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_phases_of_a_transposed_convolution_are_one_convolution() -> None:
    image, weight = seeded(2, 3, *SIZE), seeded(3, 2, 3, 3, 3)
    wanted = functional.conv_transpose3d(image, weight, stride=2, padding=1, output_padding=1)
    phases = functional.conv3d(functional.pad(image, (0, 1) * 3), kernel_of_phases(weight))
    torch.testing.assert_close(to_fine_grid(phases), wanted, rtol=1e-4, atol=1e-5)


def test_a_convolution_of_the_fine_grid_is_one_of_phases() -> None:
    phases, weight = seeded(2, 16, *SIZE), seeded(3, 2, 3, 3, 3)
    wanted = functional.conv3d(to_fine_grid(phases), weight, padding=1)
    got = to_fine_grid(functional.conv3d(phases, kernel_between_phases(weight), padding=1))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def trained(name: str, *overrides: str) -> nn.Module:
    """Made weights whose batch statistics are not a fresh network's."""
    torch.manual_seed(4)
    network = network_for(load_recipe(name, overrides)).train()
    with torch.no_grad():
        network(torch.rand(2, 1, 16, 32, 16))
    return network.eval()


@pytest.mark.parametrize("labels", [[], ["labels.2=liver"]], ids=["two_classes", "three_classes"])
def test_a_unet_gives_the_same_answer(labels: list[str]) -> None:
    network, image = trained("spleen:small", *labels), torch.rand(2, 1, 16, 32, 48)
    with torch.inference_mode():
        wanted = network(image)
        got = finest_level_in_phases(fold_for_inference(network))(image)
    if not labels:
        wanted = wanted[:, 1:] - wanted[:, :1]
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert not any(isinstance(m, nn.ConvTranspose3d) and m.out_channels < 4 for m in network.modules())


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("spleen:small", ["network.norm=instance"]),
        ("spleen:small", ["network.num_res_units=0"]),
        ("spleen:small", ["network.strides=[1,2,2]"]),
        ("bone_lesion:small", []),
    ],
    ids=["instance_norm", "without_residual_units", "fine_to_the_end", "segresnet"],
)
def test_other_networks_stay_as_they_are(name: str, overrides: list[str]) -> None:
    network = fold_for_inference(trained(name, *overrides))
    before = [type(module) for module in network.modules()]
    assert finest_level_in_phases(network) is network
    assert [type(module) for module in network.modules()] == before
