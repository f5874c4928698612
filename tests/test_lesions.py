"""Scores of single lesions: against SciPy's components, and where the answer follows from arithmetic."""

import numpy as np
import pytest
from scipy import ndimage

from ctseg.lesions import CaseLesions, Lesion, class_names, components, match_lesions, summarise_lesions, volume_class

SHAPE = (40, 36, 32)
NEIGHBOURS = np.ones((3, 3, 3))


def ball(center: tuple[int, int, int], radius: float) -> np.ndarray:
    grid = np.indices(SHAPE).reshape(3, -1).T - center
    return ((grid**2).sum(axis=1) <= radius**2).reshape(SHAPE).astype(np.uint8)


def blobs(seed: int, share: float) -> np.ndarray:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(SHAPE), 1.2)
    return (noise > np.quantile(noise, 1 - share)).astype(np.uint8)


@pytest.mark.parametrize("share", [0.003, 0.03, 0.2])
def test_components_are_those_of_scipy_with_26_neighbours(share: float) -> None:
    binary = np.asfortranarray(blobs(1, share) > 0)
    found, count = components(binary)
    wanted, wanted_count = ndimage.label(binary, NEIGHBOURS)
    assert count == wanted_count > 0
    pairs = {(int(a), int(b)) for a, b in zip(found.ravel(), wanted.ravel(), strict=True)}
    assert len(pairs) == count + 1  # one to one, outside included


@pytest.mark.parametrize("seed", range(4))
def test_equals_a_slow_count_with_scipy(seed: int) -> None:
    label, mask = blobs(seed, 0.04), blobs(seed, 0.04) & blobs(seed + 50, 0.6) | blobs(seed + 100, 0.02)
    lesions, false_positives = match_lesions(mask, label, 0.5, 0.3)
    label_parts, num_lesions = ndimage.label(label, NEIGHBOURS)
    mask_parts, num_parts = ndimage.label(mask, NEIGHBOURS)
    wanted = []
    for n in range(1, num_lesions + 1):
        own = label_parts == n
        touching = np.isin(mask_parts, np.setdiff1d(mask_parts[own], 0))
        shared = (own & touching).sum()
        volume, share = own.sum() * 0.5, shared / own.sum()
        wanted.append((volume, share, share >= 0.3, 2 * shared / (own.sum() + touching.sum())))
    got = [(lesion.volume_ml, lesion.overlap, lesion.found, lesion.dice) for lesion in lesions]
    assert sorted(got) == [pytest.approx(values) for values in sorted(wanted)]
    assert false_positives == sum(not label[mask_parts == n].any() for n in range(1, num_parts + 1)) > 0
    assert {lesion.found for lesion in lesions} == {True, False}
    assert [lesion.volume_ml for lesion in lesions] == sorted((v for v, *_ in wanted), reverse=True)


def test_two_balls_of_which_one_is_found() -> None:
    large, small = ball((10, 10, 10), 7), ball((30, 25, 22), 3)
    (first, second), false_positives = match_lesions(large, large | small, 0.001, 0.1)
    assert first == Lesion(volume_ml=pytest.approx(large.sum() * 0.001), overlap=1.0, found=True, dice=1.0)
    assert second == Lesion(volume_ml=pytest.approx(small.sum() * 0.001), overlap=0.0, found=False, dice=0.0)
    assert false_positives == 0


def test_a_lesion_found_in_part_has_the_share_and_dice_of_its_voxels() -> None:
    label, mask = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    label[4:14, 5, 5] = 1
    mask[12:16, 5, 5] = 1  # 2 of 10 voxels, 2 more outside
    ((lesion,), _) = match_lesions(mask, label, 1.0, 0.2)
    assert (lesion.overlap, lesion.found, lesion.dice) == (0.2, True, pytest.approx(2 * 2 / (10 + 4)))
    ((lesion,), _) = match_lesions(mask, label, 1.0, 0.21)
    assert not lesion.found


def test_a_mask_that_spans_two_lesions_counts_whole_for_both() -> None:
    label, mask = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    label[2:6, 5, 5] = label[8:12, 5, 5] = 1
    mask[2:12, 5, 5] = 1
    lesions, false_positives = match_lesions(mask, label, 1.0, 0.1)
    assert [lesion.dice for lesion in lesions] == [pytest.approx(2 * 4 / (4 + 10))] * 2
    assert false_positives == 0


def test_voxels_that_share_a_corner_are_one_lesion_and_with_a_gap_they_are_two() -> None:
    label = np.zeros(SHAPE, np.uint8)
    label[3, 3, 3] = label[4, 4, 4] = 1
    assert len(match_lesions(label, label, 1.0, 0.1)[0]) == 1
    label[4, 4, 4], label[5, 5, 5] = 0, 1
    assert len(match_lesions(label, label, 1.0, 0.1)[0]) == 2


def test_empty_label_empty_mask_and_both() -> None:
    empty, full = np.zeros(SHAPE, np.uint8), ball((10, 10, 10), 4)
    assert match_lesions(full, empty, 1.0, 0.1) == ((), 1)
    lesions, false_positives = match_lesions(empty, full, 1.0, 0.1)
    assert [(lesion.found, lesion.dice) for lesion in lesions] == [(False, 0.0)]
    assert false_positives == 0
    assert match_lesions(empty, empty, 1.0, 0.1) == ((), 0)


def test_only_the_named_value_counts() -> None:
    label = 2 * ball((10, 10, 10), 4) + ball((30, 25, 22), 3)
    assert len(match_lesions(label, label, 1.0, 0.1, value=2)[0]) == 1
    with pytest.raises(ValueError, match="one shape"):
        match_lesions(label, label[1:], 1.0, 0.1)


def test_a_border_belongs_to_the_upper_class() -> None:
    assert class_names([0.5, 2, 10]) == ["< 0.5", "0.5 to 2", "2 to 10", ">= 10"]
    assert [volume_class(v, [1.0, 5.0]) for v in (0.99, 1.0, 4.9, 5.0)] == ["< 1", "1 to 5", "1 to 5", ">= 5"]
    assert class_names([3.0]) == ["< 3", ">= 3"]
    assert class_names([]) == []
    assert volume_class(3.0, []) == "all"


def test_summaries_pool_lesions_over_cases() -> None:
    """Three of four lesions found: 0.75, not the mean of the cases' 1.0 and 0.5."""
    big, small, missed = Lesion(8.0, 0.9, True, 0.8), Lesion(0.5, 0.5, True, 0.6), Lesion(0.2, 0.0, False, 0.0)
    cases = [
        CaseLesions("a", "bone lesion", (big, small), 0),
        CaseLesions("b", "bone lesion", (small, missed), 3),
        CaseLesions("healthy", "bone lesion", (), 0),
        CaseLesions("a", "other", (missed,), 9),
    ]
    assert [case.sensitivity for case in cases] == [1.0, 0.5, None, 0.0]
    every, lower, middle, upper = summarise_lesions("bone lesion", cases, [1.0, 5.0])
    assert (every.volume_ml, every.lesions, every.found, every.sensitivity) == ("all", 4, 3, 0.75)
    assert every.mean_dice == pytest.approx((0.8 + 0.6 + 0.6) / 4)
    assert every.false_positives_per_case == 1.0
    assert (lower.volume_ml, lower.lesions, lower.found, lower.mean_dice) == ("< 1", 3, 2, pytest.approx(0.4))
    assert (middle.lesions, middle.sensitivity, middle.mean_dice) == (0, None, None)
    assert (upper.volume_ml, upper.sensitivity, upper.false_positives_per_case) == (">= 5", 1.0, None)
    assert summarise_lesions("none", cases, [])[0].false_positives_per_case is None
