"""Convolutions by Winograd's algorithm are the same convolutions."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ctseg.engine.backends import openvino, winograd
from ctseg.engine.runtime import Runtime
from ctseg.networks import network_for
from ctseg.recipe import load_recipe
from marks import needs_openvino

Array = NDArray[np.float32]


@pytest.fixture(autouse=True)
def small_convolutions_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "LEAST_PRODUCTS", 0)
    monkeypatch.setattr(winograd, "LEAST_CHANNELS", 1)


@pytest.fixture
def rewritten(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many convolutions of each compiled network were rewritten, of those for which it was tried."""
    numbers: list[int] = []
    use_winograd = winograd.use_winograd
    monkeypatch.setattr(winograd, "use_winograd", lambda model: numbers.append(use_winograd(model)))
    return numbers


def made(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


def model_of(image: Array, weight: Array, bias: Array | None = None, **options: Any) -> Any:
    """An OpenVINO model of one convolution; what its answer is added to shows that all its readers get it."""
    import openvino as ov
    from openvino import opset13 as ops

    given = {"strides": [1, 1, 1], "pads_begin": [1, 1, 1], "pads_end": [1, 1, 1], "dilations": [1, 1, 1], **options}
    image_in = ops.parameter(list(image.shape), np.float32)
    answer = ops.convolution(image_in, ops.constant(weight), **given)
    if bias is not None:
        answer = ops.add(answer, ops.constant(bias.reshape(1, -1, 1, 1, 1)))
    return ov.Model([ops.add(ops.relu(answer), answer)], [image_in], "convolution")


def run(model: Any, image: Array) -> Array:
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 2}
    (answer,) = openvino._core().compile_model(model, "CPU", settings)({0: image}).values()
    return np.array(answer)


def wanted(image: Array, weight: Array, bias: Array | None = None, padding: Sequence[int] = (1, 1, 1)) -> Array:
    tensors = (None if a is None else torch.from_numpy(a).double() for a in (image, weight, bias))
    answer = functional.conv3d(*tensors, padding=tuple(padding))
    return (torch.relu(answer) + answer).numpy()


def test_six_products_are_the_four_sums_of_three_taps() -> None:
    of_inputs, of_taps, of_products = winograd.matrices()
    assert (of_inputs.shape, of_taps.shape, of_products.shape) == ((6, 6), (6, 3), (4, 6))
    for tap in range(3):
        for place in range(6):
            got = of_products @ ((of_taps @ np.eye(3)[tap]) * (of_inputs @ np.eye(6)[place]))
            np.testing.assert_allclose(got, [float(output + tap == place) for output in range(4)], atol=1e-12)


def rms_of_rounding(points: tuple[float, float]) -> float:
    """How far convolutions of positive values are off whose sums and products are kept in bfloat16."""
    of_inputs, of_taps, of_products = (torch.from_numpy(matrix) for matrix in winograd.matrices(points))
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2000, 6, 64, dtype=torch.float64, generator=generator).relu().bfloat16().double()
    taps = torch.randn(3, 64, 8, dtype=torch.float64, generator=generator)
    sums, kernels = (
        torch.einsum("kj,njc->nkc", of_inputs, inputs).bfloat16().double(),
        torch.einsum("kt,tco->kco", of_taps, taps).bfloat16().double(),
    )
    got = torch.einsum("ik,nko->nio", of_products, torch.einsum("nkc,kco->nko", sums, kernels).bfloat16().double())
    exact = torch.stack([torch.einsum("ntc,tco->no", inputs[:, i : i + 3], taps) for i in range(4)], 1)
    return float((got - exact).square().mean().sqrt())


def test_the_points_round_less_in_bfloat16_than_the_usual_ones() -> None:
    assert rms_of_rounding(winograd.POINTS) < 0.75 * rms_of_rounding((1.0, 2.0))


@needs_openvino
@pytest.mark.parametrize("num_planes", [4, 8, 12, 40])
@pytest.mark.parametrize("at_once", [1, 2, 3, 1000])
def test_the_answer_is_the_convolution(num_planes: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "PART_VALUES", max(0, at_once * 5 * 6 * 7 - (at_once == 1)))
    image, weight, bias = made(1, 3, num_planes, 6, 7), made(5, 3, 3, 3, 3), made(5)
    model = model_of(image, weight, bias)
    assert winograd.use_winograd(model) == 1
    kernels = [
        list(n.input_value(1).get_shape()) for n in model.get_ordered_ops() if n.get_type_name() == "Convolution"
    ]
    assert kernels == [[5, 3, 1, 3, 3]] * 6 * math.ceil(num_planes / 4 / at_once), "nobody reads the convolution itself"
    np.testing.assert_allclose(run(model, image), wanted(image, weight, bias), rtol=1e-5, atol=1e-4)


@needs_openvino
@pytest.mark.parametrize(
    ("kernel", "padding"), [((3, 3, 3), (1, 0, 2)), ((3, 1, 1), (1, 0, 0)), ((3, 3, 1), (1, 1, 0))]
)
def test_along_the_other_axes_a_kernel_may_be_anything(kernel: tuple[int, ...], padding: tuple[int, ...]) -> None:
    image, weight = made(1, 4, 8, 6, 7), made(4, 4, *kernel)
    model = model_of(image, weight, pads_begin=list(padding), pads_end=list(padding))
    assert winograd.use_winograd(model) == 1
    np.testing.assert_allclose(run(model, image), wanted(image, weight, padding=padding), rtol=1e-5, atol=1e-4)


@needs_openvino
def test_two_convolutions_with_the_same_kernel_and_what_is_no_bias() -> None:
    """A batch of two images; one number, or one for each voxel, is added to the first answer, and then the answers."""
    import openvino as ov
    from openvino import opset13 as ops

    image, weight, each = made(2, 3, 8, 6, 7), made(3, 3, 3, 3, 3), made(1, 1, 8, 6, 7)
    image_in, kernel = ops.parameter(list(image.shape), np.float32), ops.constant(weight)
    first, second = (ops.convolution(image_in, kernel, [1] * 3, [1] * 3, [1] * 3, [1] * 3) for _ in range(2))
    added = ops.add(ops.add(first, ops.constant(np.float32([2.0]).reshape(1, 1, 1, 1, 1))), second)
    model = ov.Model([ops.add(ops.constant(each), added)], [image_in], "two convolutions")
    assert winograd.use_winograd(model) == 2
    answer = functional.conv3d(torch.from_numpy(image).double(), torch.from_numpy(weight).double(), padding=1).numpy()
    np.testing.assert_allclose(run(model, image), 2 * answer + 2 + each, rtol=1e-5, atol=1e-4)


@needs_openvino
@pytest.mark.parametrize("tap", [0, 1, 2])
def test_a_kernel_of_one_tap_moves_the_planes(tap: int) -> None:
    """Analytic: no plane changes places with another, and beyond the first and the last there are zeros."""
    planes = np.arange(1.0, 13.0, dtype=np.float32)
    image = np.broadcast_to(planes[None, None, :, None, None], (1, 1, 12, 2, 2)).copy()
    weight = np.zeros((1, 1, 3, 1, 1), np.float32)
    weight[0, 0, tap] = 1
    model = model_of(image, weight, pads_begin=[1, 0, 0], pads_end=[1, 0, 0])
    assert winograd.use_winograd(model) == 1
    padded = np.array([0.0, *planes, 0.0])
    np.testing.assert_allclose(run(model, image)[0, 0, :, 1, 0], 2 * padded[tap : tap + 12], atol=1e-4)


@needs_openvino
@pytest.mark.parametrize(
    ("size", "kernel", "options"),
    [
        ((6, 6, 7), (3, 3, 3), {}),
        ((8, 6, 7), (3, 3, 3), {"strides": [1, 2, 2]}),
        ((8, 6, 7), (3, 3, 3), {"strides": [2, 2, 2]}),
        ((8, 6, 7), (3, 3, 3), {"dilations": [1, 2, 2], "pads_begin": [1, 2, 2], "pads_end": [1, 2, 2]}),
        ((10, 6, 7), (3, 3, 3), {"pads_begin": [0, 1, 1], "pads_end": [0, 1, 1]}),
        ((8, 6, 7), (3, 3, 3), {"pads_begin": [2, 1, 1], "pads_end": [0, 1, 1]}),
        ((8, 6, 7), (1, 3, 3), {"pads_begin": [0, 1, 1], "pads_end": [0, 1, 1]}),
        ((8, 8, 7), (5, 3, 3), {"pads_begin": [2, 1, 1], "pads_end": [2, 1, 1]}),
    ],
)
def test_what_the_algorithm_is_not_for_stays(
    size: tuple[int, ...], kernel: tuple[int, ...], options: dict[str, list[int]]
) -> None:
    image, weight = made(1, 4, *size), made(4, 4, *kernel)
    model = model_of(image, weight, **options)
    before = run(model, image)
    assert winograd.use_winograd(model) == 0
    np.testing.assert_array_equal(run(model, image), before)


@needs_openvino
def test_few_channels_or_products_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    image, weight = made(1, 6, 8, 6, 7), made(3, 6, 3, 3, 3)
    products = weight.size * 8 * 6 * 7
    for channels, least_products, rewritten in ((4, 0, 1), (4.01, 0, 0), (1, products, 1), (1, products + 1, 0)):
        monkeypatch.setattr(winograd, "LEAST_CHANNELS", channels)
        monkeypatch.setattr(winograd, "LEAST_PRODUCTS", least_products)
        assert winograd.use_winograd(model_of(image, weight)) == rewritten


class Residual(nn.Module):
    """As in SegResNet: convolutions without and with a bias, and what goes in is added to what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 64, 1)
        self.second = nn.Conv3d(64, 64, 3, padding=1, bias=False)
        self.third = nn.Conv3d(64, 64, 3, padding=1)
        self.last = nn.Conv3d(64, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Two scores for each voxel."""
        before = self.first(image)
        after: Tensor = self.last(before + self.third(torch.relu(self.second(torch.relu(before)))))
        return after


@needs_openvino
@pytest.mark.parametrize(
    ("precision", "flags", "number"),
    [
        ("float32", {"avx2"}, [2]),
        ("bfloat16", {"avx2", "avx512_bf16"}, [2]),
        ("float32", {"avx2", "amx_bf16"}, [2]),
        ("bfloat16", {"avx2", "amx_bf16"}, []),
        ("float32", {"asimd"}, []),
    ],
)
def test_a_compiled_network_uses_it_where_products_are_slow(
    precision: str,
    flags: set[str],
    number: list[int],
    cpu: Runtime,
    rewritten: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(openvino, "cpu_flags", lambda: flags)
    torch.manual_seed(0)
    network, runtime, window = Residual().eval(), replace(cpu, precision=precision), (16, 12, 8)
    image = torch.rand((1, 1, *window), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        eager = network(image)
    forward = openvino.load(openvino.compile_network(network, window, runtime), window, runtime)
    assert rewritten == number
    tolerance = {"float32": 1e-5, "bfloat16": 0.02}[precision]
    assert float((forward(image) - eager).abs().max()) <= tolerance * float(eager.abs().max())


@needs_openvino
@pytest.mark.parametrize("name", ["bone_lesion:small", "deepgrow_3d:small"])
def test_whole_networks_have_the_eager_answer(
    name: str, cpu: Runtime, rewritten: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On their upper levels, where the number of planes can be divided by four, and not on the lowest."""
    suitable: list[bool] = []

    def watch(convolution: nn.Module, _: object, answer: Tensor) -> None:
        assert isinstance(convolution, nn.Conv3d)
        fits = convolution.kernel_size[0] == 3 and convolution.stride[0] == 1
        suitable.append(fits and answer.shape[2] % 4 == 0)

    monkeypatch.setattr(openvino, "cpu_flags", lambda: {"avx2"})
    recipe, window = load_recipe(name), (16, 24, 32)
    torch.manual_seed(0)
    network = network_for(recipe).eval()
    image = torch.rand((1, recipe.input_channels, *window), generator=torch.Generator().manual_seed(1))
    hooks = [m.register_forward_hook(watch) for m in network.modules() if isinstance(m, nn.Conv3d)]
    with torch.inference_mode():
        eager = network(image)
    for hook in hooks:
        hook.remove()
    forward = openvino.load(openvino.compile_network(network, window, cpu), window, cpu)
    assert rewritten == [sum(suitable)]
    assert 0 < sum(suitable) < len(suitable)
    assert float((forward(image) - eager).abs().max()) <= 1e-4 * float(eager.abs().max())
