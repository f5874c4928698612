"""Clicks: maps and simulation as in monai.apps.deepgrow, distances as in SciPy, the law of drawing by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from monai.apps.deepgrow.transforms import (
    AddGuidanceSignald,
    AddInitialSeedPointd,
    AddRandomGuidanced,
    FindDiscrepancyRegionsd,
)
from scipy import ndimage, stats

from ctseg.clicks import (
    Click,
    _level,
    chessboard_distance,
    draw_voxel,
    network_input,
    next_click,
    simulate_clicks,
)
from ctseg.specs import ClicksSpec

SPEC = ClicksSpec(num_clicks=15, sigma_voxels=2.0, margin_voxels=4, min_voxels=1)
DRAWS = 2500
ALPHA = 1e-3
"""Of the chi-square tests; seeds are fixed, so they do not fail now and then."""


def made_region(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Blobs of all sizes, some of them at the border."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 1 + seed % 3)
    return noise > noise.std() * 0.3


@pytest.mark.parametrize("size", [(40, 24, 32), (30, 41, 1)], ids=["3d", "2d"])
def test_the_maps_are_those_of_monai(size: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(3)
    points = [tuple(int(rng.integers(n)) for n in size) for _ in range(6)]
    points += [(0, 0, 0), tuple(n - 1 for n in size), points[0]]  # corners, and one voxel twice
    clicks = [Click(p, n % 3 != 2) for n, p in enumerate(points)]
    image = torch.rand(1, 1, *size)
    ours = network_input(image, [clicks], 2.0)[0]
    depth = size[2] > 1
    guidance = [[[0, *(c.point if depth else c.point[:2])] for c in clicks if c.positive is s] for s in (True, False)]
    stock_image = image[0].numpy() if depth else image[0, ..., 0].numpy()
    stock = AddGuidanceSignald(sigma=2)({"image": stock_image, "guidance": guidance})["image"]
    difference = np.abs((ours if depth else ours[..., 0]).numpy() - stock).max()
    assert stock[1].max() == 1
    assert difference < 1e-5


def test_a_map_without_clicks_is_empty_and_each_image_has_its_own() -> None:
    image = torch.rand(2, 1, 16, 16, 16)
    maps = network_input(image, [[Click((4, 5, 6))], [Click((9, 9, 9), False), Click((1, 2, 3))]], 1.0)
    assert maps.shape == (2, 3, 16, 16, 16)
    assert torch.equal(maps[:, :1], image)
    assert not maps[0, 2].any()
    assert [float(m[p]) for m, p in ((maps[0, 1], (4, 5, 6)), (maps[1, 2], (9, 9, 9)), (maps[1, 1], (1, 2, 3)))] == [
        1.0
    ] * 3


@pytest.mark.parametrize("shape", [(17, 12, 9), (8, 31, 1), (1, 1, 5)])
@pytest.mark.parametrize("seed", range(4))
def test_distances_are_those_of_scipy(shape: tuple[int, int, int], seed: int) -> None:
    region = made_region(seed, shape)
    expected = ndimage.distance_transform_cdt(region, metric="chessboard")
    assert np.array_equal(chessboard_distance(torch.from_numpy(region)).numpy(), expected)


@pytest.mark.parametrize("shape", [(3, 3, 3), (9, 14, 11), (20, 7, 30), (40, 33, 1), (1, 12, 9), (3, 50, 4)])
@pytest.mark.parametrize("faces", range(7))
def test_distances_within_and_at_each_face(shape: tuple[int, int, int], faces: int) -> None:
    """A region that keeps away from all faces of the array, and ones that touch one of them."""
    region = np.random.default_rng(faces).random(shape) < 0.97
    region[tuple(n // 2 for n in shape)] = True
    for number, (axis, end) in enumerate((axis, end) for axis in range(3) for end in (0, -1)):
        if number != faces and shape[axis] > 1:
            region.swapaxes(0, axis)[end] = False
    expected = ndimage.distance_transform_cdt(region, metric="chessboard")
    assert region.any()
    for given in (region, np.asfortranarray(region)):
        assert np.array_equal(chessboard_distance(torch.from_numpy(given)).numpy(), expected)
    assert not region.all()


def test_distances_of_everything_and_nothing() -> None:
    assert (chessboard_distance(torch.ones(4, 5, 6, dtype=torch.bool)) == -1).all(), "as SciPy has it"
    assert not chessboard_distance(torch.zeros(4, 5, 6, dtype=torch.bool)).any()
    deep = torch.zeros(410, 410, 1, dtype=torch.bool)
    deep[4:405, 4:405] = True
    assert int(chessboard_distance(deep).max()) == 201


def counts_of(region: np.ndarray, draws: list[Any]) -> np.ndarray:
    counts = np.zeros(region.shape)
    for point in draws:
        counts[point] += 1
    assert not counts[~region].any(), "clicks fall inside"
    return counts[region]


def test_a_cube_is_clicked_in_the_middle_as_often_as_computed_by_hand() -> None:
    """27 voxels: the middle has distance 2, the others 1."""
    region = np.zeros((7, 6, 5), bool)
    region[2:5, 1:4, 1:4] = True
    rng = np.random.default_rng(0)
    counts = counts_of(region, [draw_voxel(torch.from_numpy(region), rng) for _ in range(DRAWS)])
    middle, other = math.exp(2) - 1, math.exp(1) - 1
    share = middle / (middle + 26 * other)
    expected = np.full(27, DRAWS * (1 - share) / 26)
    expected[13] = DRAWS * share
    assert share == pytest.approx(0.1251, abs=1e-4)
    assert stats.chisquare(counts, expected).pvalue > ALPHA


def test_clicks_fall_as_often_as_those_of_monai() -> None:
    region = np.zeros((9, 9, 6), bool)
    region[1:6, 1:6, 1:5] = True
    region[7:, 3:5, 2:] = True  # at the border, which is no outside
    ours_rng, stock = np.random.default_rng(1), AddRandomGuidanced().set_random_state(2)
    ours = counts_of(region, [draw_voxel(torch.from_numpy(region), ours_rng) for _ in range(DRAWS)])
    theirs = [tuple(stock.find_guidance(region[None].astype(np.float32))[1:]) for _ in range(DRAWS)]
    assert stats.chi2_contingency([ours, counts_of(region, theirs)]).pvalue > ALPHA


def test_the_first_click_falls_as_monais_seed() -> None:
    label = np.zeros((8, 7, 5), np.float32)
    label[1:6, 1:6, 1:4] = 1
    rng, stock = np.random.default_rng(5), AddInitialSeedPointd().set_random_state(6)
    ours = counts_of(label > 0, [draw_voxel(torch.from_numpy(label > 0), rng) for _ in range(DRAWS)])
    theirs = [tuple(stock._apply(label[None], None)[0][0][1:]) for _ in range(DRAWS)]
    assert stats.chi2_contingency([ours, counts_of(label > 0, theirs)]).pvalue > ALPHA


def test_the_next_click_is_of_the_kind_that_monai_chooses() -> None:
    for seed in range(12):
        label, mask = made_region(seed, (12, 9, 7)), made_region(seed + 50, (12, 9, 7))
        discrepancy = FindDiscrepancyRegionsd.disparity(label.astype(float), mask.astype(float))
        positive, negative = AddRandomGuidanced().add_guidance([d[None] for d in discrepancy], True)
        click = next_click(torch.from_numpy(label), torch.from_numpy(mask), np.random.default_rng(seed))
        assert click is not None
        assert (click.positive, not click.positive) == (positive is not None, negative is not None)
        assert discrepancy[0 if click.positive else 1][click.point] == 1


def test_missed_before_extra_where_they_are_equal_and_none_where_all_is_right() -> None:
    label = torch.zeros(5, 5, 5, dtype=torch.bool)
    mask = label.clone()
    label[1, 1, 1] = mask[3, 3, 3] = True
    rng = np.random.default_rng(0)
    assert next_click(label, mask, rng) == Click((1, 1, 1), positive=True)
    mask[3, 3, 2] = True
    click = next_click(label, mask, rng)
    assert click is not None
    assert not click.positive
    assert next_click(label, label, rng) is None
    assert draw_voxel(torch.zeros(3, 3, 3, dtype=torch.bool), rng) is None


def test_probabilities_of_distances_up_to_thousands() -> None:
    """exp(d) overflows from 710 on; the deepest level has all but e**-1 of the probability of that below it."""
    counts = np.r_[0, np.ones(1000)]
    drawn = [_level(counts, u) for u in np.linspace(0, 1, 2001)[:-1]]
    assert np.bincount(drawn, minlength=1001)[[1000, 999]] / 2000 == pytest.approx([0.632, 0.2325], abs=2e-3)
    assert _level(np.array([0, 0, 3]), 0.999999) == 2
    assert _level(np.array([0, 4]), 0.0) == 1


def test_a_region_that_fills_the_array_is_clicked_anywhere() -> None:
    rng, full = np.random.default_rng(0), torch.ones(3, 4, 2, dtype=torch.bool)
    counts = counts_of(full.numpy(), [draw_voxel(full, rng) for _ in range(DRAWS)])
    assert stats.chisquare(counts).pvalue > ALPHA


def test_the_same_seed_gives_the_same_click_wherever_the_region_lies() -> None:
    region = torch.from_numpy(made_region(3, (12, 9, 7)))
    region[[0, -1]] = region[:, [0, -1]] = region[..., [0, -1]] = False
    larger = torch.zeros(40, 30, 20, dtype=torch.bool)
    larger[5:17, 6:15, 7:14] = region
    for seed in range(20):
        small, large = (draw_voxel(r, np.random.default_rng(seed)) for r in (region, larger))
        assert small is not None
        assert large == tuple(n + move for n, move in zip(small, (5, 6, 7), strict=True))


def rngs_of(number: int, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, n]) for n in range(number)]


def test_training_clicks_come_with_falling_probability() -> None:
    """Against a network that never finds anything, N + 1 - sum(j / N) clicks are expected: the first and 8 of 15."""
    images, seen = 150, []
    label = torch.zeros(images, 1, 8, 8, 8)
    label[:, :, 1:7, 1:7, 1:7] = 1

    def nothing(image: torch.Tensor) -> torch.Tensor:
        seen.append(len(image))
        return torch.full_like(image[:, :1], -1.0)

    simulate_clicks(torch.zeros_like(label), label, nothing, SPEC, rngs_of(images))
    assert len(seen) == 15
    assert seen[0] == images
    rounds = np.arange(15)
    deviations = (np.array(seen) - images * (1 - rounds / 15)) / np.sqrt(images * (rounds / 15) * (1 - rounds / 15) + 1)
    assert np.abs(deviations).max() < 4


def test_each_image_has_its_own_clicks_whatever_stands_beside_it() -> None:
    label = torch.from_numpy(np.stack([made_region(seed, (10, 12, 8)) for seed in range(4)]))[:, None].float()
    image = torch.rand(label.shape, generator=torch.Generator().manual_seed(0))

    def half(network_in: torch.Tensor) -> torch.Tensor:
        return network_in[:, :1] + network_in[:, 1:2] - network_in[:, 2:] - 0.5

    together = simulate_clicks(image, label, half, SPEC, rngs_of(4))
    alone = [simulate_clicks(image[n : n + 1], label[n : n + 1], half, SPEC, rngs_of(4)[n : n + 1]) for n in range(4)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together, simulate_clicks(image, label, half, SPEC, rngs_of(4, seed=1)))
    assert torch.equal(together[:, :1], image)
    assert (together[:, 1].flatten(1).amax(1) == 1).all()


def test_an_empty_label_has_no_first_click() -> None:
    label = torch.zeros(1, 1, 6, 6, 6)
    result = simulate_clicks(label, label, lambda image: image[:, :1] - 1, SPEC, rngs_of(1))
    assert not result.any()
