"""Convolutions by Winograd's algorithm are the same convolutions."""

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
from ctseg.engine.compiled import is_installed
from ctseg.engine.runtime import Runtime

pytestmark = pytest.mark.skipif(not is_installed("openvino"), reason="needs pip install 'ctseg[openvino]'")
Array = NDArray[np.float32]


@pytest.fixture(autouse=True)
def small_convolutions_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "LEAST_PRODUCTS", 0)
    monkeypatch.setattr(winograd, "LEAST_CHANNELS", 1)


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


@pytest.mark.parametrize("num_planes", [4, 8, 12, 40])
@pytest.mark.parametrize("part_planes", [1, 2, 1000])
def test_the_answer_is_the_convolution(num_planes: int, part_planes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "PART_VALUES", part_planes * 5 * 6 * 7)
    image, weight, bias = made(1, 3, num_planes, 6, 7), made(5, 3, 3, 3, 3), made(5)
    model = model_of(image, weight, bias)
    assert winograd.use_winograd(model) == 1
    kernels = [
        list(n.input_value(1).get_shape()) for n in model.get_ordered_ops() if n.get_type_name() == "Convolution"
    ]
    assert all(kernel == [5, 3, 1, 3, 3] for kernel in kernels), "somebody still reads the convolution itself"
    np.testing.assert_allclose(run(model, image), wanted(image, weight, bias), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("kernel", "padding"), [((3, 3, 3), (1, 0, 2)), ((3, 1, 1), (1, 0, 0)), ((3, 3, 1), (1, 1, 0))]
)
def test_along_the_other_axes_a_kernel_may_be_anything(kernel: tuple[int, ...], padding: tuple[int, ...]) -> None:
    image, weight = made(1, 4, 8, 6, 7), made(4, 4, *kernel)
    model = model_of(image, weight, pads_begin=list(padding), pads_end=list(padding))
    assert winograd.use_winograd(model) == 1
    np.testing.assert_allclose(run(model, image), wanted(image, weight, padding=padding), rtol=1e-5, atol=1e-4)


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
    precision: str, flags: set[str], number: list[int], cpu: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino, "cpu_flags", lambda: flags)
    rewritten: list[int] = []
    use_winograd = winograd.use_winograd
    monkeypatch.setattr(winograd, "use_winograd", lambda *a: rewritten.append(use_winograd(*a)))
    torch.manual_seed(0)
    network, runtime, window = Residual().eval(), replace(cpu, precision=precision), (16, 12, 8)
    image = torch.rand((1, 1, *window), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        eager = network(image)
    forward = openvino.load(openvino.compile_network(network, window, runtime), window, runtime)
    assert rewritten == number
    tolerance = {"float32": 1e-5, "bfloat16": 0.02}[precision]
    assert float((forward(image) - eager).abs().max()) <= tolerance * float(eager.abs().max())
