"""Made chests: lungs with pneumonia, whose label holds what a threshold loses."""

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from ctseg.manifest import check_files, read_manifest
from ctseg.sources.made import MadeCase, write_made
from ctseg.sources.phantom import centered_grid
from ctseg.sources.phantom_lung import (
    AIRWAY,
    CONSOLIDATION,
    GROUND_GLASS,
    LUNG_VALUES,
    STRUCTURES,
    lung_data,
    make_lung,
    plan_lung,
)
from ctseg.volume import to_ras

GRID = centered_grid((84, 64, 64), (3.0, 3.0, 3.0), "LPS", center_mm=(10.0, -150.0, 700.0))
CASES = 6
COARSE = centered_grid((32, 24, 24), (8.0, 8.0, 8.0), "LPS")


@pytest.fixture(scope="module")
def chests() -> list[MadeCase]:
    return [make_lung(3, index, grid=GRID) for index in range(CASES)]


def hu_inside(case: MadeCase, *values: int) -> np.ndarray:
    """HU of the structures' voxels that do not lie at their surface."""
    return case.image.array[ndimage.binary_erosion(case.mask(*values).array)]


def test_a_case_depends_on_seed_and_index_alone() -> None:
    one, again, other = (make_lung(5, index, grid=GRID) for index in (1, 1, 2))
    assert np.array_equal(one.image.array, again.image.array)
    assert np.array_equal(one.organs.array, again.organs.array)
    assert not np.array_equal(one.organs.array, other.organs.array)


def test_volumes_fit_together(chests: list[MadeCase]) -> None:
    for case in chests:
        assert (case.image.array.dtype, case.organs.array.dtype) == (np.int16, np.uint8)
        assert case.image.array.shape == case.organs.array.shape == GRID.size
        assert case.image.array.min() >= -1024
        assert set(np.unique(case.organs.array)) <= {0, *map(int, STRUCTURES)}


@pytest.mark.parametrize(
    ("values", "low", "high"), [((7, 8), -900, -790), ((AIRWAY,), -1010, -900), ((6,), 90, 190), ((12,), 60, 190)]
)
def test_structures_have_their_hounsfield_units(
    chests: list[MadeCase], values: tuple[int, ...], low: float, high: float
) -> None:
    for case in chests:
        inside = hu_inside(case, *values)
        if len(inside) > 20:
            assert low < np.median(inside) < high


def test_most_patients_are_ill_and_some_are_not(chests: list[MadeCase]) -> None:
    """Also that ground glass lies between lung and soft tissue, and that consolidations are as dense as muscle."""
    glass = np.concatenate([hu_inside(case, GROUND_GLASS) for case in chests])
    dense = np.concatenate([hu_inside(case, CONSOLIDATION) for case in chests])
    assert -700 < np.percentile(glass, 10) < np.percentile(glass, 90) < -250
    assert 0 < np.median(dense) < 80
    ill = [make_lung(0, n, grid=COARSE).mask(GROUND_GLASS, CONSOLIDATION).array.any() for n in range(12)]
    assert 7 <= sum(ill) < 12


def test_disease_lies_inside_the_label_and_a_threshold_loses_it(chests: list[MadeCase]) -> None:
    lost = []
    for case in chests:
        label, dense = case.mask(*LUNG_VALUES).array, case.mask(CONSOLIDATION).array
        assert label[dense == 1].all()
        dark = (case.image.array < -400) & (label == 1)
        lost.append(1 - dark.sum() / label.sum())
    assert max(lost) > 0.06
    everything_dark = [(c.image.array < -400).sum() / c.mask(*LUNG_VALUES).array.sum() for c in chests]
    assert min(everything_dark) > 1.3  # the air around the patient is as dark


def test_windpipe_is_air_but_not_lung(chests: list[MadeCase]) -> None:
    for case in chests:
        airway = case.mask(AIRWAY).array
        assert airway.sum() * GRID.voxel_volume_ml > 1
        assert not (airway & case.mask(*LUNG_VALUES).array).any()


def test_two_lungs_of_plausible_size_left_and_right_of_the_middle(chests: list[MadeCase]) -> None:
    for case in chests:
        ml = case.mask(*LUNG_VALUES).array.sum() * GRID.voxel_volume_ml
        assert 600 < ml < 2200
        left, right = (np.argwhere(case.mask(v).array).mean(axis=0)[0] for v in (7, 8))
        assert left > right + 20  # the grid's x grows to the patient's left


def test_the_same_patient_on_any_axis_order() -> None:
    straight = make_lung(4, 0, grid=GRID)
    for codes in ("IRP", "PSL", "RAS"):
        letters = {"L": 84, "R": 84, "P": 64, "A": 64, "S": 64, "I": 64}
        size = tuple(letters[c] for c in codes)
        turned = make_lung(4, 0, grid=centered_grid(size, (3.0, 3.0, 3.0), codes, center_mm=(10.0, -150.0, 700.0)))
        assert turned.organs.geometry.axis_codes == codes
        assert np.array_equal(to_ras(straight.organs).array, to_ras(turned.organs).array)


def test_default_scans_hold_both_lungs_in_many_orientations() -> None:
    grids = [plan_lung(0, index).geometry for index in range(40)]
    assert len({grid.axis_codes for grid in grids}) > 8
    assert all(np.prod(grid.size) < 6.2e6 for grid in grids)
    label = to_ras(make_lung(0, 3).mask(*LUNG_VALUES)).array
    assert not label[:, :, -1].any()  # the tips are in the scan
    assert not label[[0, -1]].any()
    assert not label[:, [0, -1]].any()


def test_written_set_is_a_manifest_of_lungs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = centered_grid((25, 20, 18), (10.0, 10.0, 11.0), "LAS")
    monkeypatch.setattr("ctseg.sources.phantom_lung.make_lung", lambda s, i: make_lung(s, i, grid=grid))
    counts = {"training": 1, "validation": 1, "testing": 1, "test": 1}
    manifest = check_files(read_manifest(write_made(tmp_path, lung_data(), counts, 0, lambda _: None)))
    assert manifest.name == "phantom_lung"
    assert manifest.labels == {"1": "lung"}
    assert [case.name for case in manifest.cases] == [f"phantom_lung_{n:03d}" for n in range(4)]
