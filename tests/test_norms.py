"""Group normalisation by channels against PyTorch's, in float64 as the judge."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctseg.arrays import to_numpy
from ctseg.engine.backends import openvino
from ctseg.engine.runtime import Runtime
from ctseg.networks import network_for
from ctseg.norms import ChannelwiseGroupNorm, with_channelwise_group_norms
from ctseg.recipe import load_recipe
from marks import needs_openvino


def exact(norm: nn.GroupNorm, image: Tensor) -> Tensor:
    """What it gives in double precision."""
    weight, bias = (None if p is None else p.double() for p in (norm.weight, norm.bias))
    return nn.functional.group_norm(image.double(), norm.num_groups, weight, bias, norm.eps)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("size", [(16, 8, 24), (5, 7, 3), (1, 1, 1), (8, 8, 9)])
@pytest.mark.parametrize(("groups", "channels"), [(1, 6), (2, 6), (6, 6)])
def test_same_as_pytorchs(groups: int, channels: int, size: tuple[int, int, int], affine: bool) -> None:
    """Channels of very different means and spreads, a constant one among them."""
    torch.manual_seed(0)
    norm = nn.GroupNorm(groups, channels, affine=affine)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    image = torch.randn(2, channels, *size) * torch.arange(channels).view(1, -1, 1, 1, 1) + 3
    with torch.no_grad():
        got = ChannelwiseGroupNorm(norm)(image)
        wanted = exact(norm, image)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)


@needs_openvino
def test_openvino_adds_up_millions_of_voxels_well() -> None:
    """It adds one by one; without blocks the error is 0.01."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 4, 1), nn.GroupNorm(2, 4)).eval()
    window, image = (128, 128, 128), torch.rand(1, 1, 128, 128, 128)
    with torch.no_grad():
        wanted = exact(network[1], network[0](image))
    runtime = Runtime(torch.device("cpu"))
    forward = openvino.load(openvino.compile_network(network, window, runtime), window, runtime)
    error = np.abs(to_numpy(forward(image)) - wanted.numpy()).max()
    assert error < 5e-5


def test_a_network_is_copied_and_answers_the_same() -> None:
    torch.manual_seed(0)
    network = network_for(load_recipe("bone_lesion:small")).eval()
    changed = with_channelwise_group_norms(network)
    assert any(type(m) is nn.GroupNorm for m in network.modules())
    assert not any(type(m) is nn.GroupNorm for m in changed.modules())
    image = torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(changed(image), network(image), rtol=1e-4, atol=1e-4)
    unet = network_for(load_recipe("spleen:small"))
    assert with_channelwise_group_norms(unet) is unet
