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
from collections.abc import Sequence
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
"""Of a sum of planes, at most: what lies between the image and the answer is to stay in a CPU's cache."""
PLANES = 2
"""The axis of an image [B, C, X, Y, Z] that its planes are counted along."""

Matrix: TypeAlias = NDArray[np.float64]


def use_winograd(model: Any) -> int:
    """Rewrites the large convolutions of an OpenVINO model of static shapes, and returns how many there were.

    The model computes the same to rounding.
    """
    found = [node for node in model.get_ordered_ops() if _suits(node)]
    for node in found:
        _rewrite(node)
    return len(found)


@functools.cache
def matrices() -> tuple[Matrix, Matrix, Matrix]:
    """Sums of inputs `[6, 6]`, sums of taps `[6, 3]` and sums of products `[4, 6]`.

    Output i is the sum over t of input i + t times tap t. All four are
    `of_products @ ((of_taps @ taps) * (of_inputs @ inputs))`.
    """
    finite = [0.0, *(sign * point for point in POINTS for sign in (1, -1))]
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
    """Whether it is a convolution of three planes each to one, which keeps their number, and large enough."""
    if node.get_type_name() != "Convolution" or node.input_value(1).get_node().get_type_name() != "Constant":
        return False
    about, kernel, answer = node.get_attributes(), list(node.input_value(1).get_shape()), list(node.get_output_shape(0))
    return (
        len(kernel) == 5
        and kernel[PLANES] == TAPS
        and about["pads_begin"][0] == about["pads_end"][0] == 1
        and set(about["strides"]) == set(about["dilations"]) == {1}
        and answer[PLANES] % OUTPUTS == 0
        and statistics.harmonic_mean(kernel[:PLANES]) >= LEAST_CHANNELS
        and math.prod(kernel) * math.prod(answer[PLANES:]) >= LEAST_PRODUCTS
    )


def _rewrite(node: Any) -> None:
    """Puts sums of products in place of a convolution and of the bias after it."""
    from openvino import opset13 as ops

    last, bias = _with_bias(node)
    readers = list(last.output(0).get_target_inputs())
    of_inputs, of_taps, of_products = matrices()
    image, num_planes, at_once = node.input_value(0), int(node.get_output_shape(0)[PLANES]), _outputs_at_once(node)
    kernels = np.einsum("kt,oityz->koiyz", of_taps, node.input_value(1).get_node().data.astype(np.float64))
    weights = [ops.constant(np.ascontiguousarray(kernel[:, :, None], np.float32)) for kernel in kernels]
    begin, end = ([0, *list(node.get_attributes()[name])[1:]] for name in ("pads_begin", "pads_end"))
    zeros = ops.constant(np.zeros((1, kernels.shape[2], 1, *list(image.get_shape())[3:]), np.float32))
    answer: list[Any] = []
    for first in range(0, num_planes, OUTPUTS * at_once):
        inputs = [_every_fourth(image, zeros, first + n - 1, at_once) for n in range(INPUTS)]
        products = [
            ops.convolution(planes, weight, [1, 1, 1], begin, end, [1, 1, 1])
            for planes, weight in zip(_sums(of_inputs, inputs), weights, strict=True)
        ]
        outputs = _sums(of_products, products)
        if bias is not None:
            outputs = [ops.add(output, ops.constant(bias)) for output in outputs]
        planes_of = [ops.split(output, np.int64(PLANES), at_once).outputs() for output in outputs]
        answer += [planes_of[n][place] for place in range(at_once) for n in range(OUTPUTS)]
    whole = ops.concat(answer, PLANES)
    for reader in readers:
        reader.replace_source_output(whole.output(0))


def _with_bias(node: Any) -> tuple[Any, NDArray[np.float32] | None]:
    """The node that adds a constant to each channel of a convolution, and what it adds; or the convolution itself."""
    readers = list(node.output(0).get_target_inputs())
    after = readers[0].get_node() if len(readers) == 1 else None
    if after is None or after.get_type_name() != "Add":
        return node, None
    added = after.input_value(1).get_node()
    is_bias = list(added.get_output_shape(0)) == [1, int(node.get_output_shape(0)[1]), 1, 1, 1]
    return (after, added.data) if is_bias and added.get_type_name() == "Constant" else (node, None)


def _outputs_at_once(node: Any) -> int:
    """How many planes of each of the four outputs are computed in one part: a divisor of their number."""
    _, _, num_planes, *plane = (int(n) for n in node.get_output_shape(0))
    values = max(int(n) for n in list(node.input_value(1).get_shape())[:PLANES]) * math.prod(plane)
    number = num_planes // OUTPUTS
    return max(n for n in range(1, number + 1) if number % n == 0 and (n == 1 or n * values <= PART_VALUES))


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
