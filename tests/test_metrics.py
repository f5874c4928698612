"""Dice against MONAI's and against arithmetic."""

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice

from ctseg.metrics import dice, mean_or_none, sd_or_none

SHAPE = (7, 11, 5)


def box(*ranges: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(SHAPE, np.uint8)
    mask[tuple(slice(*r) for r in ranges)] = 1
    return mask


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("value", [1, 2])
def test_equals_monai_on_random_masks(seed: int, value: int):
    generator = np.random.default_rng(seed)
    mask, label = (generator.integers(0, 3, SHAPE, dtype=np.uint8) for _ in range(2))
    one_hot = [torch.from_numpy(np.stack([m == v for v in range(3)])[None].astype(np.float32)) for m in (mask, label)]
    expected = compute_dice(*one_hot, include_background=True)[0, value].item()
    assert dice(mask, label, value) == pytest.approx(expected, abs=1e-6)


def test_analytic():
    label = box((0, 4), (0, 4), (0, 4))
    assert dice(label, label) == 1.0
    assert dice(box((2, 6), (0, 4), (0, 4)), label) == 0.5
    assert dice(box((0, 4), (0, 4), (0, 1)), label) == pytest.approx(2 * 16 / (16 + 64))
    assert dice(box((5, 6), (5, 6), (4, 5)), label) == 0.0


def test_only_voxels_of_the_value_count():
    mask, label = box((0, 4), (0, 4), (0, 4)) * np.uint8(2), box((0, 4), (0, 4), (0, 4))
    assert dice(mask, label) == 0.0
    assert dice(mask, mask, 2) == 1.0
    assert dice(mask, mask, 1) is None


def test_empty_rules():
    empty, full = np.zeros(SHAPE, np.uint8), np.ones(SHAPE, np.uint8)
    assert dice(empty, full) == 0.0
    assert dice(full, empty) is None
    assert dice(empty, empty) is None


def test_shapes_must_match_even_where_numpy_would_broadcast():
    with pytest.raises(ValueError, match=r"one shape, got \(7, 11, 5\) and \(7, 11, 1\)"):
        dice(np.ones(SHAPE, np.uint8), np.ones((7, 11, 1), np.uint8))


def test_mean_and_sample_standard_deviation():
    assert mean_or_none([]) is None
    assert mean_or_none([0.25]) == 0.25
    assert mean_or_none([1.0, 2.0, 6.0]) == 3.0
    assert sd_or_none([]) is None
    assert sd_or_none([0.25]) is None
    assert sd_or_none([1.0, 2.0, 6.0]) == pytest.approx(7**0.5)
