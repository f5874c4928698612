"""The networks: their size, their shape and their first weights."""

import copy
from dataclasses import replace

import pytest
import torch
from monai.networks.nets import BasicUNet, UNet
from torch import Tensor, nn

from ctseg.networks import (
    OneSlopePReLU,
    build_network,
    channels_last,
    count_parameters,
    fold_for_inference,
    network_for,
    tune_for_training,
)
from ctseg.recipe import Recipe, load_recipe


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("spleen", 4_808_917),
        ("lung", 27_086_072),
        ("lung_soft_dice", 27_086_072),
        ("bone_lesion", 18_796_002),
        ("deepgrow_3d", 22_627_009),
        ("deepgrow_2d", 7_783_425),
        ("deepgrow_3d:mmar", 22_627_009),
        ("deepgrow_3d:residual", 19_223_440),
    ],
)
def test_recipes_have_the_parameters_of_the_originals(name: str, count: int) -> None:
    assert count_parameters(network_for(load_recipe(name))) == count


def test_spleen_is_the_unet_of_the_original_configuration() -> None:
    torch.manual_seed(5)
    network = network_for(load_recipe("spleen"))
    torch.manual_seed(5)
    expected = UNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=2,
        channels=(16, 32, 64, 128, 256),
        strides=(2, 2, 2, 2),
        num_res_units=2,
        norm="batch",
    )
    weights, wanted = network.state_dict(), expected.state_dict()
    assert list(weights) == list(wanted)
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    image = torch.randn(1, 1, 32, 32, 48)
    with torch.inference_mode():
        torch.testing.assert_close(network.eval()(image), expected.eval()(image), rtol=0, atol=0)


def test_deepgrow_is_monais_basic_unet_with_maps_of_clicks() -> None:
    torch.manual_seed(5)
    network = network_for(load_recipe("deepgrow_3d:small"))
    torch.manual_seed(5)
    expected = BasicUNet(3, in_channels=3, out_channels=1, features=(8, 16, 32, 32, 32, 8))
    weights, wanted = network.state_dict(), expected.state_dict()
    assert list(weights) == list(wanted)
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


def test_a_2d_network_sees_every_slice_by_itself() -> None:
    torch.manual_seed(5)
    network = channels_last(network_for(load_recipe("deepgrow_2d:small"))).eval()
    torch.manual_seed(5)
    expected = BasicUNet(2, in_channels=3, out_channels=1, features=(8, 16, 32, 32, 32, 8)).eval()
    assert list(network.state_dict()) == list(expected.state_dict())
    image = torch.randn(2, 3, 32, 48, 3)
    with torch.inference_mode():
        scores = network(image)
        assert scores.shape == (2, 1, 32, 48, 3)
        for z in range(3):
            torch.testing.assert_close(scores[..., z], expected(image[..., z]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("labels", "channels"), [({"1": "a"}, 2), ({"1": "a", "2": "b", "3": "c"}, 4)])
def test_one_score_for_each_class_on_the_input_grid(tiny_recipe: Recipe, labels: dict[str, str], channels: int) -> None:
    network = network_for(replace(tiny_recipe, labels=labels))
    assert network(torch.zeros(2, 1, 16, 8, 24)).shape == (2, channels, 16, 8, 24)


def test_input_channels_norm_and_units_follow_the_spec(tiny_recipe: Recipe) -> None:
    spec = load_recipe("spleen:small", ["network.norm=instance", "network.num_res_units=0"]).network
    kinds = {type(module) for module in build_network(spec, in_channels=3, out_channels=5).modules()}
    assert torch.nn.InstanceNorm3d in kinds
    assert torch.nn.BatchNorm3d not in kinds
    first = next(m for m in build_network(spec, 3, 5).modules() if isinstance(m, torch.nn.Conv3d))
    assert (first.in_channels, first.out_channels) == (3, 8)


def test_frozen_parameters_are_not_counted() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    assert count_parameters(network) == 3 * 4 + 4 + 4 * 2 + 2
    network[0].requires_grad_(False)
    assert count_parameters(network) == 4 * 2 + 2


def test_folded_network_gives_the_same_answer_and_leaves_its_input_alone() -> None:
    torch.manual_seed(3)
    network = network_for(load_recipe("spleen:small")).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):  # statistics and slopes as after a training, not the neutral ones
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
        if isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, -0.3, 0.4)
    image = torch.randn(1, 1, 32, 32, 32)
    before = image.clone()
    with torch.inference_mode():
        wanted = network(image)
        got = fold_for_inference(network)(image)
    assert torch.equal(image, before)
    assert float((wanted - got).abs().max()) < 1e-5 * float(wanted.abs().max())
    assert not any(isinstance(module, nn.BatchNorm3d | nn.PReLU) for module in network.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_fast_prelu_has_pytorchs_values_and_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    stock = nn.PReLU(init=0.3).to(dtype if dtype is torch.float64 else torch.float32)
    fast = tune_for_training(copy.deepcopy(stock), torch.device("cpu"))
    assert type(fast) is OneSlopePReLU
    images = [torch.randn(2, 3, 9, 8, 7, dtype=dtype).requires_grad_()]
    images.append(images[0].detach().clone().requires_grad_())
    weights = torch.randn(2, 3, 9, 8, 7).to(dtype)
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-5
    results = []
    for layer, image in zip((stock, fast), images, strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            results.append(layer(image))
        (results[-1] * weights).sum().backward()
    assert results[0].dtype == results[1].dtype
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(images[1].grad, images[0].grad, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(fast.weight.grad, stock.weight.grad, rtol=tolerance, atol=tolerance)


def test_only_what_is_slow_is_replaced() -> None:
    layers = nn.Sequential(nn.PReLU(), nn.PReLU(4), nn.LeakyReLU())
    assert [type(m) for m in tune_for_training(layers, torch.device("cuda"))] == [nn.PReLU, nn.PReLU, nn.LeakyReLU]
    assert [type(m) for m in tune_for_training(layers, torch.device("cpu"))] == [OneSlopePReLU, nn.PReLU, nn.LeakyReLU]


def bfloat16_gradient(convolution: nn.Module, image: Tensor) -> tuple[Tensor, torch.dtype]:
    """Of the weights, after memory was left full of NaN; and the type of the answer."""
    convolution.zero_grad()
    values = convolution.weight.numel()  # type: ignore[union-attr,operator]
    left = [torch.full((number,), torch.nan) for number in (values, 2 * values, 2**20)]
    del left
    with torch.autocast("cpu", torch.bfloat16):
        answer = convolution(image)
    answer.float().square().sum().backward()
    return convolution.weight.grad.clone(), answer.dtype  # type: ignore[union-attr,operator]


@pytest.mark.parametrize(
    ("convolution", "size"),
    [
        (nn.Conv3d(16, 16, 3, padding=1), (2, 4, 4)),
        (nn.Conv3d(16, 16, (3, 3, 1), padding=(1, 1, 0)), (2, 2, 1)),
        (nn.Conv3d(16, 16, 5, padding=2), (3, 6, 6)),
        (nn.Conv3d(16, 16, 3, padding=1, stride=2), (4, 1, 4)),
        (nn.ConvTranspose3d(16, 16, 3, padding=1), (2, 2, 2)),
        (nn.Conv2d(16, 16, 3, padding=1, stride=2), (4, 1)),
    ],
)
def test_gradients_of_images_smaller_than_a_kernel_are_right_in_bfloat16(
    convolution: nn.Module, size: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    image = torch.randn(2, 16, *size)
    convolution(image).square().sum().backward()
    wanted = convolution.weight.grad.clone()  # type: ignore[union-attr,operator]
    safe = tune_for_training(nn.Sequential(copy.deepcopy(convolution)), torch.device("cpu"))[0]  # type: ignore[index]
    for _ in range(5):
        got, dtype = bfloat16_gradient(safe, image)
        assert torch.allclose(got, wanted, atol=0.02 * float(wanted.abs().max()))
        assert dtype == torch.float32


def test_other_convolutions_stay_in_reduced_precision() -> None:
    network = nn.Sequential(nn.Conv3d(8, 8, 3, padding=1), nn.ConvTranspose3d(8, 8, 3, padding=1))
    names = list(network.state_dict())
    safe = tune_for_training(network, torch.device("cpu"))
    assert list(safe.state_dict()) == names
    with torch.autocast("cpu", torch.bfloat16):
        assert [layer(torch.zeros(1, 8, 3, 4, 5)).dtype for layer in safe] == [torch.bfloat16] * 2  # type: ignore[operator]
        with torch.inference_mode():
            assert [layer(torch.zeros(1, 8, 2, 2, 2)).dtype for layer in safe] == [torch.bfloat16] * 2  # type: ignore[operator]
    assert [layer(torch.zeros(1, 8, 2, 2, 2)).dtype for layer in safe] == [torch.float32] * 2  # type: ignore[operator]
