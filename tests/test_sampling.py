"""Random patches: where they lie, how often, and that nothing depends on what was drawn before."""

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from monai.transforms import Flip, Rotate90
from monai.transforms.utils import correct_crop_centers
from numpy.typing import NDArray

from ctseg.arrays import cut_box
from ctseg.recipe import load_recipe
from ctseg.sampling import CaseArrays, Draw, cut_batch, draw_start, draw_step, epoch_batches, generator
from ctseg.specs import Augmentation, Sampling

SAMPLING = Sampling(patch_size=(8, 6, 4), patches_per_case=4, positive_fraction=0.5)
NO_SHIFT = Augmentation(shift_offset=0.1, shift_probability=0.0)

Maker = Callable[..., CaseArrays]


def case_of(image_XYZ: NDArray[np.float16], label_XYZ: NDArray[np.uint8], name: str = "case") -> CaseArrays:
    foreground = np.flatnonzero(label_XYZ).astype(np.int32)
    return CaseArrays(name, torch.from_numpy(image_XYZ), torch.from_numpy(label_XYZ), image_XYZ, label_XYZ, foreground)


def made_case(shape: tuple[int, int, int] = (21, 17, 13), seed: int = 0) -> CaseArrays:
    """Air (0) in the lower half along x, body above; a small structure in the body. Every voxel has its own value."""
    image = np.random.default_rng(seed).uniform(0.1, 1, shape).astype(np.float16)
    image[: shape[0] // 2] = 0
    label = np.zeros(shape, np.uint8)
    label[-4:-1, 5:8, 6:9] = 1
    return case_of(image, label)


def lone_voxel(shape: tuple[int, int, int], voxel: tuple[int, int, int]) -> CaseArrays:
    label = np.zeros(shape, np.uint8)
    label[voxel] = 1
    return case_of(np.ones(shape, np.float16), label)


def test_spleen_has_the_iterations_of_its_card() -> None:
    training = load_recipe("spleen").training
    batches = epoch_batches([1.0] * 31, training.batch_cases, training.seed, epoch=0)
    assert [len(batch) for batch in batches] == [4] * 7 + [3]
    assert len(batches) * training.epochs == 10_080


def test_every_epoch_holds_every_case_once_in_its_own_order() -> None:
    epochs = [[n for batch in epoch_batches([1.0] * 31, 4, 0, epoch) for n in batch] for epoch in range(20)]
    assert all(sorted(order) == list(range(31)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 20
    assert epoch_batches([1.0] * 31, 4, 0, 0) != epoch_batches([1.0] * 31, 4, 1, 0)


def test_places_in_the_training_have_their_own_streams() -> None:
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0, 1), (0, 1, 0, 1)]
    firsts = [int(generator(*place).integers(2**62)) for place in places]
    assert len(set(firsts)) == len(places)


def test_a_draw_depends_on_its_place_alone() -> None:
    cases = [made_case(seed=n) for n in range(3)]
    augmentation = Augmentation(shift_offset=0.1, shift_probability=0.5)
    first = draw_step(cases, [1, 0, 1], SAMPLING, augmentation, seed=3, place=(5, 2))
    np.random.seed(0)  # the global stream must not matter
    torch.manual_seed(0)
    draw_step(cases, [0, 1], SAMPLING, augmentation, seed=3, place=(5, 1))
    again = draw_step(cases, [1, 0, 1], SAMPLING, augmentation, seed=3, place=(5, 2))
    assert again == first
    assert [draw.case for draw in first] == [1] * 4 + [0] * 4 + [1] * 4
    assert first[:4] != first[8:]  # a case that comes twice gives other patches
    for seed, place in ((3, (6, 2)), (3, (5, 3)), (4, (5, 2))):
        assert draw_step(cases, [1, 0, 1], SAMPLING, augmentation, seed, place) != first


def test_cases_come_as_often_as_their_weights_say() -> None:
    """Weights 1 : 3 : 4 over 500 epochs of three draws; tolerances of four binomial deviations."""
    drawn = [n for epoch in range(500) for batch in epoch_batches([1.0, 3.0, 4.0], 2, 0, epoch) for n in batch]
    assert len(drawn) == 1500
    for case, share in enumerate((1 / 8, 3 / 8, 4 / 8)):
        assert drawn.count(case) / 1500 == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 1500))


def test_flips_and_quarter_turns_are_those_of_monai_and_of_numpy() -> None:
    """Image and label go together; each axis flips by itself; turns are counted in the x-y plane."""
    case, sampling = made_case(), replace(SAMPLING, patch_size=(6, 6, 4))
    plain = Draw(0, (11, 3, 2))
    for turns in range(4):
        for flips in itertools.product((False, True), repeat=3):
            draw = replace(plain, flips=flips, turns=turns)
            image, label = cut_batch([case], [plain, draw], sampling, torch.device("cpu"))
            for patches in (image, label):
                expected = np.rot90(np.flip(patches[0, 0].numpy(), np.flatnonzero(flips)), turns, (0, 1))
                np.testing.assert_array_equal(patches[1, 0].numpy(), expected)
                turned = Rotate90(k=turns, spatial_axes=(0, 1))(Flip(np.flatnonzero(flips).tolist())(patches[0]))
                np.testing.assert_array_equal(patches[1].numpy(), turned.numpy())


def test_flips_and_turns_have_their_probabilities() -> None:
    """2000 patches, tolerances of four binomial deviations; one, two and three quarter turns come equally often."""
    augmentation = replace(NO_SHIFT, flip_probability=0.2, rotate90_probability=0.3)
    sampling = replace(SAMPLING, patch_size=(6, 6, 4), patches_per_case=100)
    draws = [d for epoch in range(20) for d in draw_step([made_case()], [0], sampling, augmentation, 0, (epoch, 0))]
    for axis in range(3):
        assert np.mean([d.flips[axis] for d in draws]) == pytest.approx(0.2, abs=4 * np.sqrt(0.16 / 2000))
    for turns, share in ((0, 0.7), (1, 0.1), (2, 0.1), (3, 0.1)):
        assert np.mean([d.turns == turns for d in draws]) == pytest.approx(share, abs=4 * np.sqrt(share * 0.9 / 2000))
    assert not any(any(d.flips) or d.turns for d in draw_step([made_case()], [0], sampling, NO_SHIFT, 0, (0, 0)))


def centre_of(start: tuple[int, int, int]) -> tuple[int, ...]:
    """The voxel a patch is centred on, where it was not moved inside the case."""
    return tuple(s + n // 2 for s, n in zip(start, SAMPLING.patch_size, strict=True))


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
def test_share_of_patches_on_foreground(fraction: float) -> None:
    """The structure is one voxel far from every border, so a patch is centred on it exactly when it was drawn for it.

    2000 draws of probability p scatter by sqrt(p (1 - p) / 2000) <= 0.0112; four of these are allowed. By chance the
    background's centre cannot be there, as it has no label.
    """
    case = lone_voxel((24, 20, 16), (12, 10, 8))
    sampling, rng = replace(SAMPLING, positive_fraction=fraction), np.random.default_rng(11)
    starts = [draw_start(case, sampling, rng) for _ in range(2000)]
    share = np.mean([centre_of(start) == (12, 10, 8) for start in starts])
    assert share == pytest.approx(fraction, abs=4 * np.sqrt(fraction * (1 - fraction) / 2000))


def test_foreground_voxels_are_drawn_evenly() -> None:
    """Eight voxels of two label values, 4000 draws: 500 each, give or take five standard deviations (21)."""
    label = np.zeros((24, 20, 16), np.uint8)
    label[10:12, 8:10, 7], label[10:12, 8:10, 8] = 1, 2
    case, rng = case_of(np.ones_like(label, np.float16), label), np.random.default_rng(5)
    sampling = replace(SAMPLING, positive_fraction=1.0)
    counts = Counter(centre_of(draw_start(case, sampling, rng)) for _ in range(4000))
    assert set(counts) == {tuple(int(n) for n in voxel) for voxel in np.argwhere(label)}
    assert all(abs(count - 500) < 5 * 21 for count in counts.values())


def test_background_centres_lie_in_the_body_and_outside_the_label() -> None:
    """A patch of one voxel is its own centre."""
    case, rng = made_case(), np.random.default_rng(1)
    sampling = replace(SAMPLING, patch_size=(1, 1, 1), positive_fraction=0.0)
    centres = [draw_start(case, sampling, rng) for _ in range(1000)]
    assert all(case.host_label[c] == 0 and case.host_image[c] > 0 for c in centres)
    assert len(set(centres)) > 500  # of 2119 such voxels


def test_foreground_centre_is_inside_the_patch_and_the_patch_inside_the_case() -> None:
    """The structure is at the border, where patches are moved."""
    shape = (21, 17, 13)
    rng = np.random.default_rng(2)
    for voxel in [(0, 0, 0), (20, 16, 12), (0, 16, 6), (3, 2, 2), (17, 14, 11)]:
        start = draw_start(lone_voxel(shape, voxel), replace(SAMPLING, positive_fraction=1.0), rng)
        assert all(s <= v < s + n for s, v, n in zip(start, voxel, SAMPLING.patch_size, strict=True))
        assert all(0 <= s <= length - n for s, n, length in zip(start, SAMPLING.patch_size, shape, strict=True))


@pytest.mark.parametrize("size", [(8, 6, 4), (7, 5, 3), (21, 16, 13), (1, 2, 17)])
def test_patches_start_where_those_of_monai_do(size: tuple[int, int, int]) -> None:
    """Every centre along each axis, against the clamping of RandCropByPosNegLabel and the cut of SpatialCrop."""
    shape, sampling = (21, 17, 17), replace(SAMPLING, patch_size=size, positive_fraction=1.0)
    rng = np.random.default_rng(0)
    for axis, length in enumerate(shape):
        for position in range(length):
            voxel = tuple(position if a == axis else 9 for a in range(3))
            centre = correct_crop_centers(list(voxel), size, shape)
            expected = tuple(int(c) - n // 2 for c, n in zip(centre, size, strict=True))
            assert draw_start(lone_voxel(shape, voxel), sampling, rng) == expected


def test_a_case_without_foreground_gives_background() -> None:
    image = np.zeros((20, 20, 20), np.float16)
    image[15:] = 1
    case, rng = case_of(image, np.zeros_like(image, np.uint8)), np.random.default_rng(0)
    sampling = Sampling(patch_size=(1, 1, 1), patches_per_case=1, positive_fraction=1.0)
    assert all(draw_start(case, sampling, rng)[0] >= 15 for _ in range(50))


@pytest.mark.parametrize("label_value", [0, 1], ids=["air alone", "label alone"])
def test_a_case_without_background_in_the_body_still_gives_patches(label_value: int) -> None:
    image = np.full((9, 9, 9), label_value, np.float16)
    case = case_of(image, np.full_like(image, label_value, np.uint8))
    start = draw_start(case, replace(SAMPLING, positive_fraction=0.0), np.random.default_rng(0))
    assert all(0 <= s <= 9 - n for s, n in zip(start, SAMPLING.patch_size, strict=True))


def test_shift_has_its_probability_and_stays_within_its_offset() -> None:
    """Uniform in +-0.2: mean 0, standard deviation 0.2 / sqrt(3); 4000 patches, tolerances of four deviations."""
    augmentation = Augmentation(shift_offset=0.2, shift_probability=0.3)
    case, sampling = made_case(), replace(SAMPLING, patches_per_case=100)
    shifts = np.array(
        [d.shift for epoch in range(40) for d in draw_step([case], [0], sampling, augmentation, 0, (epoch, 0))]
    )
    shifted = shifts[shifts != 0]
    assert len(shifted) / 4000 == pytest.approx(0.3, abs=4 * np.sqrt(0.3 * 0.7 / 4000))
    assert abs(shifted).max() <= 0.2
    deviation = 0.2 / np.sqrt(3)
    assert shifted.mean() == pytest.approx(0, abs=4 * deviation / np.sqrt(len(shifted)))
    assert shifted.std() == pytest.approx(deviation, rel=0.1)


def test_positions_do_not_depend_on_the_shift_options() -> None:
    """Changing the size of the shift alone keeps every patch where it was."""
    case = made_case()
    small, large = (
        draw_step([case], [0], SAMPLING, Augmentation(shift_offset=offset, shift_probability=1.0), 0, (0, 0))
        for offset in (0.1, 0.2)
    )
    assert [d.start for d in small] == [d.start for d in large]
    assert [2 * d.shift for d in small] == pytest.approx([d.shift for d in large])


def test_batch_holds_the_voxels_of_its_draws_with_their_shifts() -> None:
    cases = [made_case(seed=1), made_case(seed=2)]
    draws = [Draw(1, (13, 11, 9), 0.0), Draw(0, (0, 5, 2), 0.25)]
    image, label = cut_batch(cases, draws, SAMPLING, torch.device("cpu"))
    assert (image.shape, image.dtype) == ((2, 1, 8, 6, 4), torch.float32)
    assert (label.shape, label.dtype) == ((2, 1, 8, 6, 4), torch.uint8)
    first, second = cases[1].host_image[13:, 11:, 9:], cases[0].host_image[:8, 5:11, 2:6]
    np.testing.assert_array_equal(image[0, 0].numpy(), first.astype(np.float32))
    np.testing.assert_array_equal(image[1, 0].numpy(), second.astype(np.float32) + np.float32(0.25))
    np.testing.assert_array_equal(label[0, 0].numpy(), cases[1].host_label[13:, 11:, 9:])


def test_shifting_a_batch_leaves_the_case_alone() -> None:
    case = made_case()
    before = case.host_image.copy()
    cut_batch([case], [Draw(0, (0, 0, 0), 0.5)], SAMPLING, torch.device("cpu"))
    np.testing.assert_array_equal(case.host_image, before)


def test_a_small_case_is_padded_on_both_sides() -> None:
    """3 x 7 x 2 into 8 x 6 x 5: x lacks 5 (2 before, 3 after), y is cut, z lacks 3 (1 before, 2 after)."""
    image = np.random.default_rng(0).uniform(0.5, 1, (3, 7, 2)).astype(np.float16)
    patch = cut_box(torch.from_numpy(image), (0, 1, 0), (8, 6, 5))
    expected = np.zeros((8, 6, 5), np.float16)
    expected[2:5, :, 1:3] = image[:, 1:]
    np.testing.assert_array_equal(patch.numpy(), expected)


def test_a_small_case_is_drawn_from_its_first_voxel() -> None:
    case, rng = lone_voxel((3, 17, 2), (2, 16, 1)), np.random.default_rng(0)
    for fraction in (0.0, 1.0):
        x, y, z = draw_start(case, replace(SAMPLING, positive_fraction=fraction), rng)
        assert (x, z) == (0, 0)
        assert 0 <= y <= 17 - 6
