"""Outlines and fills: each mask comes back exactly, for any rule of filling; repeated and nested contours."""

import numpy as np
import pytest
from matplotlib.path import Path as Polygon
from numpy.typing import NDArray

from ctseg.errors import ImageError
from ctseg.io.dicom import contours
from ctseg.io.dicom.contours import fill, fill_all, outlines


def ring(size: int = 40) -> NDArray[np.bool_]:
    """A disk with an off-centre hole and an island in it."""
    x, y = np.mgrid[:size, :size].astype(float)
    disk = np.hypot(x - 19, y - 21) < 15
    hole = np.hypot(x - 16, y - 20) < 8
    return (disk & ~hole) | (np.hypot(x - 15, y - 20) < 3)


def noise(seed: int, density: float) -> NDArray[np.bool_]:
    return np.random.default_rng(seed).random((31, 23)) < density


SHAPES = {
    "nothing": np.zeros((9, 8), bool),
    "everything": np.ones((9, 8), bool),
    "one pixel": np.pad(np.ones((1, 1), bool), ((0, 6), (3, 2))),
    "a line": np.pad(np.ones((1, 5), bool), ((2, 6), (0, 2))),
    "touching corners": np.kron(np.eye(4, dtype=bool), np.ones((2, 2), bool)),
    "hole of one pixel": ~np.pad(np.ones((1, 1), bool), 3),
    "holes in a row": ~np.pad(np.tile([[True], [False]], (4, 1)), ((1, 0), (3, 3))),
    "ring with island": ring(),
    **{f"noise {d}": noise(int(100 * d), d) for d in (0.1, 0.4, 0.5, 0.6, 0.8, 0.95)},
}


@pytest.mark.parametrize("name", SHAPES)
def test_fill_undoes_outlines(name: str) -> None:
    mask = SHAPES[name]
    polygons = outlines(mask)
    united = np.any([fill(p, mask.shape) for p in polygons], axis=0) if polygons else np.zeros_like(mask)
    np.testing.assert_array_equal(united, mask)
    parity = sum((fill(p, mask.shape).astype(int) for p in polygons), np.zeros(mask.shape, int))
    assert parity.max(initial=0) <= 1, "regions must not overlap: any rule of combining them gives the mask"
    np.testing.assert_array_equal(fill_all(polygons, mask.shape), mask)


@pytest.mark.parametrize("name", SHAPES)
def test_matplotlib_finds_the_same_pixels_within(name: str) -> None:
    """A judge that counts windings instead of crossings."""
    mask = SHAPES[name]
    centres = np.argwhere(np.ones_like(mask)).astype(float)
    within = np.zeros(mask.size, bool)
    for polygon in outlines(mask):
        within |= Polygon(np.vstack([polygon, polygon[:1]]), closed=True).contains_points(centres)
    np.testing.assert_array_equal(within.reshape(mask.shape), mask)


@pytest.mark.parametrize("name", ["ring with island", "noise 0.6", "noise 0.95"])
def test_rounding_and_turning_in_space_changes_no_pixel(name: str) -> None:
    mask = SHAPES[name]
    turn = np.array([[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]])
    for polygon in outlines(mask):
        there = np.round(polygon @ turn.T * 0.7 + 123.456, 3)
        back = (there - 123.456) / 0.7 @ turn
        np.testing.assert_array_equal(fill(back, mask.shape), fill(polygon, mask.shape))


def test_outlines_keep_a_quarter_pixel_off_every_centre() -> None:
    for name, mask in SHAPES.items():
        for start in outlines(mask):
            end = np.roll(start, -1, axis=0)
            steps = np.linspace(0, 1, 201)[:, None, None]
            path = start + steps * (end - start)
            assert np.hypot(*(path - np.round(path)).reshape(-1, 2).T).min() >= 0.25, name


def test_one_polygon_for_a_region_with_many_holes() -> None:
    mask = np.ones((21, 21), bool)
    mask[1::2, 1::2] = False
    assert len(outlines(mask)) == 1


def test_straight_lines_have_no_points_between_their_ends() -> None:
    (polygon,) = outlines(np.pad(np.ones((300, 200), bool), 1))
    assert len(polygon) == 8


@pytest.mark.parametrize(
    ("corners", "expected"),
    [
        ([(0.5, 0.5), (3.5, 0.5), (3.5, 2.5), (0.5, 2.5)], (slice(1, 4), slice(1, 3))),
        ([(0, 0), (3, 0), (3, 2), (0, 2)], (slice(0, 3), slice(0, 2))),
        ([(-50, -50), (3.5, -50), (3.5, 99), (-50, 99)], (slice(0, 4), slice(None))),
        ([(100, 100), (200, 100), (200, 200)], (slice(0, 0), slice(0, 0))),
        ([(1, 1), (2, 1)], (slice(0, 0), slice(0, 0))),
    ],
)
def test_fill_by_hand(corners: list[tuple[float, float]], expected: tuple[slice, slice]) -> None:
    mask = np.zeros((6, 5), bool)
    mask[expected] = True
    np.testing.assert_array_equal(fill(np.array(corners, float), (6, 5)), mask)


def test_fill_of_a_disk_is_the_disk() -> None:
    angles = np.linspace(0, 2 * np.pi, 100_000, endpoint=False)
    x, y = np.mgrid[:50, :60]
    disk = np.hypot(x - 25.3, y - 28.8) < 17.05
    polygon = np.array([25.3, 28.8]) + 17.05 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    np.testing.assert_array_equal(fill(polygon, (50, 60)), disk)
    np.testing.assert_array_equal(fill(polygon[::-1], (50, 60)), disk)


def square(low: float, high: float) -> NDArray[np.float64]:
    return np.array([(low, low), (high, low), (high, high), (low, high)])


@pytest.mark.parametrize("repeats", [1, 2, 25])
def test_repeated_contours_count_once(repeats: int) -> None:
    expected = fill(square(1.5, 8.5), (12, 12))
    contours = [np.roll(square(1.5, 8.5), n, axis=0)[:: 1 if n % 2 else -1] + 1e-4 * n for n in range(repeats)]
    np.testing.assert_array_equal(fill_all(contours, (12, 12)), expected)


def test_inner_contours_are_holes_and_islands_and_others_unite() -> None:
    size = (30, 30)
    nested = [square(12.5, 14.5), square(1.5, 20.5), square(10.5, 16.5)]
    expected = fill(nested[1], size) & ~fill(nested[2], size) | fill(nested[0], size)
    np.testing.assert_array_equal(fill_all(nested, size), expected)
    overlapping = [square(1.5, 9.5), square(5.5, 15.5)]
    np.testing.assert_array_equal(fill_all(overlapping, size), fill(overlapping[0], size) | fill(overlapping[1], size))


def test_thousands_of_large_contours_take_little_memory(at_most, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    shaken = [
        np.array([[0, 0], [511, generator.uniform(0, 9)], [510, 511], [generator.uniform(0, 9), 509]])
        for _ in range(100)
    ]
    with at_most(2**24):  # as bytes they would take 26 MB
        fill_all(shaken, (512, 512))
    monkeypatch.setattr(contours, "MAX_PART_BYTES", 2**20)
    with pytest.raises(ImageError, match="large contours on one slice are more than can be trusted"):
        fill_all(shaken, (512, 512))
