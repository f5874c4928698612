"""What a window shows: sizes, places inside the grid, and where its voxels lie in the patient."""

import numpy as np
import pytest

from ctseg.regions import Region, inside, point_in_window, region_around, region_size, window_geometry
from ctseg.volume import Geometry

WINDOW = (32, 32, 16)


def test_a_region_is_the_window_where_that_holds_box_and_margin() -> None:
    assert region_size((5, 5, 5), (28, 10, 5), WINDOW, margin=4) == (32, 32, 16)
    assert region_size((5, 5, 5), (29, 10, 5), WINDOW, margin=4) == (33, 32, 16)
    assert region_size((0, 0, 7), (99, 99, 7), (64, 64, 1), margin=9) == (118, 118, 1), "2D stays one slice"


@pytest.mark.parametrize(
    ("point", "start"),
    [((50, 40, 30), (34, 24, 22)), ((0, 0, 0), (0, 0, 0)), ((99, 79, 59), (68, 48, 44))],
)
def test_a_region_lies_around_its_box_and_inside_the_grid(point: tuple[int, ...], start: tuple[int, ...]) -> None:
    region = region_around(point, point, (100, 80, 60), WINDOW, margin=4)
    assert (region.start, region.size) == (start, WINDOW)


def test_a_smaller_grid_lies_in_the_middle() -> None:
    assert inside((7, 7, 7), (32, 32, 16), (20, 32, 11)) == (-6, 0, -2)


def test_points_keep_their_place() -> None:
    region = Region((10, 20, -4), (64, 32, 16))
    assert point_in_window((10, 20, 0), region, WINDOW) == (0, 0, 4)
    assert point_in_window((11, 21, 0), region, WINDOW) == (0, 1, 4)
    assert point_in_window((73, 51, 11), region, WINDOW) == (31, 31, 15)
    odd = Region((0, 0, 0), (33, 32, 16))
    assert point_in_window((16, 0, 0), odd, WINDOW) == (16, 0, 0)
    assert point_in_window((32, 0, 0), odd, WINDOW) == (31, 0, 0)


def test_the_windows_voxels_lie_where_their_share_of_the_grid_is() -> None:
    turn = np.array([[0, 1, 0], [0.6, 0, 0.8], [-0.8, 0, 0.6]]).T
    grid = Geometry.from_parts((100, 80, 60), (1.0, 2.0, 3.0), (-7.0, 4.0, 9.0), turn)
    whole = window_geometry(grid, Region((10, 20, 5), WINDOW), WINDOW)
    assert whole.size == WINDOW
    assert np.allclose(whole.affine[:, 3], grid.affine @ [10, 20, 5, 1])
    assert np.allclose(whole.affine[:3, :3], grid.affine[:3, :3])
    shrunk = window_geometry(grid, Region((10, 20, 5), (64, 32, 48)), WINDOW, pad=1)
    assert shrunk.size == (34, 34, 18)
    assert shrunk.spacing_mm == pytest.approx((2.0, 2.0, 9.0))
    # The first voxel of the window shows voxels 10 and 11 along x, 5 to 7 along z; one of padding comes before it.
    assert np.allclose(shrunk.affine @ [1, 1, 1, 1], grid.affine @ [10.5, 20, 6, 1])
