"""Geometry: axis codes, the way to RAS, and grids that agree. nibabel and SimpleITK are the independent references."""

from itertools import permutations, product

import nibabel
import numpy as np
import pytest
import SimpleITK

from ctseg.volume import Geometry, Volume, orientation_to_ras, to_ras

SPACING_MM = {"L": 0.7, "P": 1.3, "S": 2.5}
SIZE = {"L": 7, "P": 11, "S": 5}
PAIRS = ("LR", "PA", "SI")
ORIENTATIONS = [
    "".join(pair[bit] for pair, bit in zip(axes, bits, strict=True))
    for axes in permutations(PAIRS)
    for bits in product((0, 1), repeat=3)
]
ORIGIN_MM = (-12.5, 33.25, 401.75)


def axis(code: str) -> str:
    """L, P or S: the letter of the patient axis that a code lies on."""
    return next(pair[0] for pair in PAIRS if code in pair)


def rotation(*degrees: float) -> np.ndarray:
    """Turns about z, then x."""
    a, b = np.radians(degrees)
    turn_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    turn_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    return turn_x @ turn_z


def grid(codes: str, turn: np.ndarray | None = None) -> Geometry:
    """A grid whose axes point to `codes`, every patient axis with its own size and spacing; turned if asked."""
    vectors = {"L": (1, 0, 0), "R": (-1, 0, 0), "P": (0, 1, 0), "A": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
    direction = np.array([vectors[c] for c in codes], dtype=float).T
    size, spacing_mm = (tuple(table[axis(c)] for c in codes) for table in (SIZE, SPACING_MM))
    return Geometry.from_parts(size, spacing_mm, ORIGIN_MM, direction if turn is None else turn @ direction)


@pytest.mark.parametrize("turn", [None, rotation(20, -35)], ids=["straight", "oblique"])
@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_all_48_orientations(codes: str, turn: np.ndarray | None):
    geometry = grid(codes, turn)
    assert geometry.axis_codes == codes
    assert geometry.axis_codes == "".join(nibabel.aff2axcodes(geometry.affine_ras))
    array = np.arange(np.prod(geometry.size), dtype=np.int16).reshape(geometry.size)
    ras = to_ras(Volume(array, geometry))
    assert ras.geometry.axis_codes == "RAS"
    assert ras.array.shape == ras.geometry.size == (SIZE["L"], SIZE["P"], SIZE["S"])
    assert np.shares_memory(ras.array, array)
    np.testing.assert_allclose(ras.geometry.spacing_mm, tuple(SPACING_MM.values()))
    for index in [(0, 0, 0), (1, 2, 3), tuple(n - 1 for n in geometry.size)]:
        place_mm = geometry.affine @ [*index, 1]
        new_index = np.argwhere(ras.array == array[index])[0]
        np.testing.assert_allclose(ras.geometry.affine @ [*new_index, 1], place_mm, atol=1e-9)
    reference = nibabel.as_closest_canonical(nibabel.Nifti1Image(array, geometry.affine_ras))
    np.testing.assert_array_equal(ras.array, np.asanyarray(reference.dataobj))
    np.testing.assert_allclose(ras.geometry.affine_ras, reference.affine, atol=1e-9)


def test_orientation_of_a_sagittal_scan():
    """Its x runs to the back, y to the feet, z to the left."""
    assert orientation_to_ras(grid("PIL")) == [(1, -1), (2, -1), (0, -1)]


@pytest.mark.parametrize("codes", ["LPS", "RAI", "SRP"])
def test_physical_points_are_those_of_simpleitk(codes: str):
    geometry = grid(codes, rotation(10, 25))
    image = SimpleITK.Image([int(n) for n in geometry.size], SimpleITK.sitkUInt8)
    image.SetSpacing(geometry.spacing_mm)
    image.SetOrigin(geometry.origin_mm)
    image.SetDirection(geometry.direction.ravel().tolist())
    for index in [(0, 0, 0), (1, 2, 3), (4, 0, 2)]:
        point = image.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose((geometry.affine @ [*index, 1])[:3], point, atol=1e-9)


def test_parts_of_a_grid():
    turn = rotation(20, -35)
    geometry = Geometry.from_parts((7, 11, 5), (0.7, 1.3, 2.5), ORIGIN_MM, turn)
    np.testing.assert_allclose(geometry.spacing_mm, (0.7, 1.3, 2.5))
    assert geometry.origin_mm == ORIGIN_MM
    np.testing.assert_allclose(geometry.direction, turn, atol=1e-12)
    np.testing.assert_allclose(geometry.affine_ras[:3, 3], (12.5, -33.25, 401.75))
    np.testing.assert_allclose(geometry.affine_ras[:, 0], geometry.affine[:, 0] * [-1, -1, 1, 1])


@pytest.mark.parametrize("codes", ["LPS", "RPS"])
def test_voxel_volume_is_positive_in_left_handed_grids_too(codes: str):
    assert grid(codes, rotation(20, -35)).voxel_volume_ml == pytest.approx(0.7 * 1.3 * 2.5 / 1000)


def moved(geometry: Geometry, *by_mm: float) -> Geometry:
    affine = geometry.affine.copy()
    affine[:3, 3] += by_mm
    return Geometry(geometry.size, affine)


def test_agreement_is_a_share_of_the_smallest_spacing():
    geometry = grid("LPS")
    assert geometry.agrees_with(geometry)
    assert geometry.agrees_with(moved(geometry, 0, 0, 0.049 * 0.7))
    assert not geometry.agrees_with(moved(geometry, 0, 0, 0.051 * 0.7))
    assert geometry.corner_distance_voxels(moved(geometry, 3 * 0.7, 4 * 0.7, 0)) == pytest.approx(5)


def test_a_small_turn_is_seen_at_the_far_corner():
    """0.1 degrees about z, where 400 voxels are 0.7 voxels apart though the origins are equal."""
    one = Geometry.from_parts((401, 401, 1), (1, 1, 1), (0, 0, 0), np.eye(3))
    other = Geometry.from_parts((401, 401, 1), (1, 1, 1), (0, 0, 0), rotation(0.1, 0))
    assert one.corner_distance_voxels(other) == pytest.approx(np.radians(0.1) * 400 * np.sqrt(2), rel=1e-3)
    assert not one.agrees_with(other)


def test_other_size_or_other_order_of_axes_is_another_grid():
    geometry = grid("LPS")
    assert not geometry.agrees_with(Geometry((7, 11, 6), geometry.affine))
    cube = Geometry.from_parts((4, 4, 4), (1, 1, 1), (0, 0, 0), np.eye(3))
    swapped = Geometry.from_parts((4, 4, 4), (1, 1, 1), (0, 0, 0), np.eye(3)[:, [1, 0, 2]])
    assert not cube.agrees_with(swapped)
