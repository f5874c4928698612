"""Large convolutions of an OpenVINO model with half of their products: Winograd's algorithm along the first axis.

Four neighbouring outputs of three taps take 12 products. Six are enough for sums of their six inputs: the outputs are
sums of these six. Here an input is a plane of an image, an output a plane of the answer, and a product a convolution
within planes. Where channels are few, sums take what the products save.

S. Winograd, "Arithmetic Complexity of Computations", 1980; A. Lavin and S. Gray, "Fast Algorithms for Convolutional
Neural Networks", CVPR 2016.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.polynomial import Polynomial
from numpy.typing import NDArray

TAPS, OUTPUTS = 3, 4
INPUTS = OUTPUTS + TAPS - 1
POINTS = (2 / 3, 3 / 2)
"""The products are values of polynomials at 0, at these points, at their opposites, and at infinity.

In bfloat16 these round 0.7 times as much as the usual 1 and 2; of all pairs hardly any rounds less.
"""
LEAST_CHANNELS, LEAST_PRODUCTS = 40, 5e9
"""Of a convolution that is rewritten; the channels are the harmonic mean of the input's and the output's.

Smaller ones are not faster, and 32 channels to 32 hardly are: their sums take long, and round most in bfloat16.
"""
PART_VALUES = 2_200_000
"""Of a sum of planes, if that is not a single one: what lies between image and answer is to stay in a CPU's cache."""
PLANES = 2
"""The axis of an image [B, C, X, Y, Z] that its planes are counted along."""

Matrix: TypeAlias = NDArray[np.float64]


def use_winograd(model: Any) -> int:
    """Rewrites the large convolutions of an OpenVINO model, and returns how many there were.

    The model computes the same to rounding. Only what has static shapes and constant weights is rewritten.
    """
    found = [node for node in model.get_ordered_ops() if _suits(node)]
    for node in found:
        _rewrite(node)
    return len(found)


@functools.cache
def matrices(points: tuple[float, float] = POINTS) -> tuple[Matrix, Matrix, Matrix]:
    """Sums of inputs `[6, 6]`, sums of taps `[6, 3]` and sums of products `[4, 6]`.

    Output i is the sum over t of input i + t times tap t. All four are
    `of_products @ ((of_taps @ taps) * (of_inputs @ inputs))`.
    """
    finite = [0.0, *(sign * point for point in points for sign in (1, -1))]
    others = [[other for other in finite if other != point] for point in finite]
    of_inputs = np.zeros((INPUTS, INPUTS))
    for row, roots in enumerate([*others, finite]):
        of_inputs[row, : len(roots) + 1] = Polynomial.fromroots(roots).coef
    of_taps = np.zeros((INPUTS, TAPS))
    for row, (point, roots) in enumerate(zip(finite, others, strict=True)):
        of_taps[row] = point ** np.arange(TAPS) / math.prod(point - root for root in roots)
    of_products = np.array([[point**output for point in finite] + [0.0] for output in range(OUTPUTS)])
    of_taps[-1, -1] = of_products[-1, -1] = 1.0
    return of_inputs, of_taps, of_products


def _suits(node: Any) -> bool:
    """Whether it is a large convolution whose kernel has three planes, with stride 1 and padding 1 across them."""
    if node.get_type_name() != "Convolution" or node.input_value(1).get_node().get_type_name() != "Constant":
        return False
    if not (node.get_input_partial_shape(0).is_static and node.get_output_partial_shape(0).is_static):
        return False
    about, kernel, answer = node.get_attributes(), list(node.input_value(1).get_shape()), list(node.get_output_shape(0))
    return (
        len(kernel) == 5
        and kernel[PLANES] == TAPS
        and about["pads_begin"][0] == about["pads_end"][0] == 1
        and set(about["strides"]) == set(about["dilations"]) == {1}
        and answer[PLANES] % OUTPUTS == 0
        and statistics.harmonic_mean(_channels(node)) >= LEAST_CHANNELS
        and math.prod(kernel) * math.prod(answer[PLANES:]) >= LEAST_PRODUCTS
    )


def _channels(node: Any) -> tuple[int, int]:
    """Of a convolution's output and input."""
    out_channels, in_channels, *_ = (int(n) for n in node.input_value(1).get_shape())
    return out_channels, in_channels


def _rewrite(node: Any) -> None:
    """Puts sums of products in place of a convolution and of the bias after it."""
    from openvino import opset13 as ops

    last, bias = _with_bias(node)
    readers = list(last.output(0).get_target_inputs())
    convolve, image = _convolutions(node), node.input_value(0)
    batch, channels, num_planes, *plane = (int(n) for n in image.get_shape())
    zeros = ops.constant(np.zeros((batch, channels, 1, *plane), np.float32))
    most = max(1, PART_VALUES // (max(_channels(node)) * math.prod(plane)))
    answer: list[Any] = []
    for first in range(0, num_planes, OUTPUTS * most):
        number = min(most, (num_planes - first) // OUTPUTS)
        inputs = [_every_fourth(image, zeros, first + n - 1, number) for n in range(INPUTS)]
        answer += _part(inputs, convolve, bias, number)
    whole = ops.concat(answer, PLANES)
    for reader in readers:
        reader.replace_source_output(whole.output(0))


def _with_bias(node: Any) -> tuple[Any, NDArray[np.float32] | None]:
    """The node that adds a constant to each channel of a convolution, and what it adds; or the convolution itself."""
    readers = list(node.output(0).get_target_inputs())
    after = readers[0].get_node() if len(readers) == 1 else None
    if after is None or after.get_type_name() != "Add":
        return node, None
    added, of_channels = after.input_value(1).get_node(), [1, _channels(node)[0], 1, 1, 1]
    is_bias = added.get_type_name() == "Constant" and list(added.get_output_shape(0)) == of_channels
    return (after, added.data) if is_bias else (node, None)


def _convolutions(node: Any) -> list[Callable[[Any], Any]]:
    """What each sum of inputs goes through: a convolution within planes, whose kernel is a sum of the taps."""
    from openvino import opset13 as ops

    _, of_taps, _ = matrices()
    kernels = np.einsum("kt,oityz->koiyz", of_taps, node.input_value(1).get_node().data.astype(np.float64))
    begin, end = ([0, *node.get_attributes()[name][1:]] for name in ("pads_begin", "pads_end"))

    def convolution(kernel_OIYZ: Matrix) -> Callable[[Any], Any]:
        weight = ops.constant(np.ascontiguousarray(kernel_OIYZ[:, :, None], np.float32))
        return lambda planes: ops.convolution(planes, weight, [1, 1, 1], begin, end, [1, 1, 1])

    return [convolution(kernel) for kernel in kernels]


def _part(
    inputs: list[Any], convolve: list[Callable[[Any], Any]], bias: NDArray[np.float32] | None, number: int
) -> list[Any]:
    """Four times that many planes of the answer, in their order."""
    from openvino import opset13 as ops

    of_inputs, _, of_products = matrices()
    products = [run(planes) for run, planes in zip(convolve, _sums(of_inputs, inputs), strict=True)]
    outputs = _sums(of_products, products)
    if bias is not None:
        outputs = [ops.add(output, ops.constant(bias)) for output in outputs]
    planes_of = [ops.split(output, np.int64(PLANES), number).outputs() for output in outputs]
    return [planes_of[n][place] for place in range(number) for n in range(OUTPUTS)]


def _every_fourth(image: Any, zeros: Any, first: int, number: int) -> Any:
    """That many planes of the image from the first on; zeros where it has none, before it or after it."""
    from openvino import opset13 as ops

    num_planes = int(image.get_shape()[PLANES])
    inside = [n for n in range(first, first + OUTPUTS * number, OUTPUTS) if 0 <= n < num_planes]
    parts: list[Any] = []
    if inside:
        parts.append(ops.slice(image, *(np.array([n]) for n in (inside[0], inside[-1] + 1, OUTPUTS, PLANES))))
    if len(inside) < number:
        parts.insert(0 if first < 0 else len(parts), zeros)
    return ops.concat(parts, PLANES) if len(parts) > 1 else parts[0]


def _sums(factors: Matrix, values: Sequence[Any]) -> list[Any]:
    """The rows of a matrix times the values: chains that share nothing, each of which OpenVINO computes in one pass."""
    from openvino import opset13 as ops

    def scaled(value: Any, factor: float) -> Any:
        return value if factor == 1 else ops.multiply(value, ops.constant(np.full((1, 1, 1, 1, 1), factor, np.float32)))

    return [
        functools.reduce(ops.add, [scaled(value, factor) for value, factor in zip(values, row, strict=True) if factor])
        for row in factors
    ]
