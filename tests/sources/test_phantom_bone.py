"""Made spines, ribs and pelvises with bone lesions."""

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from ctseg.manifest import check_files, read_manifest
from ctseg.sources.made import MadeCase, write_made
from ctseg.sources.phantom import centered_grid
from ctseg.sources.phantom_bone import (
    BLASTIC,
    LESION_VALUES,
    LOOK_ALIKE,
    LYTIC,
    MIXED,
    STRUCTURES,
    bone_data,
    make_bone,
    plan_bone,
)
from ctseg.sources.phantom_tissue import VALUE
from ctseg.volume import to_ras

GRID = centered_grid((124, 94, 94), (3.0, 3.0, 3.0), "LPS", center_mm=(10.0, -150.0, 700.0))
CASES = 8


@pytest.fixture(scope="module")
def trunks() -> list[MadeCase]:
    return [make_bone(3, index, grid=GRID) for index in range(CASES)]


def lesion_ml(case: MadeCase) -> np.ndarray:
    """Volumes of a case's lesions."""
    parts, count = ndimage.label(case.mask(*LESION_VALUES).array, np.ones((3, 3, 3)))
    return np.bincount(parts.ravel(), minlength=count + 1)[1:] * case.organs.geometry.voxel_volume_ml


def hu_inside(cases: list[MadeCase], value: int) -> np.ndarray:
    """HU of the structure's voxels that do not lie at its surface, over all cases."""
    return np.concatenate([case.image.array[ndimage.binary_erosion(case.mask(value).array)] for case in cases])


def test_a_case_depends_on_seed_and_index_alone() -> None:
    coarse = centered_grid((80, 60, 60), (5.0, 5.0, 5.0))
    one, again, other = (make_bone(5, index, grid=coarse) for index in (1, 1, 2))
    assert np.array_equal(one.image.array, again.image.array)
    assert np.array_equal(one.organs.array, again.organs.array)
    assert not np.array_equal(one.organs.array, other.organs.array)


def test_volumes_fit_together(trunks: list[MadeCase]) -> None:
    for case in trunks:
        assert (case.image.array.dtype, case.organs.array.dtype) == (np.int16, np.uint8)
        assert case.image.array.shape == case.organs.array.shape == GRID.size
        assert set(np.unique(case.organs.array)) <= {0, *map(int, STRUCTURES)}


def test_lesions_are_of_three_kinds_with_their_hounsfield_units(trunks: list[MadeCase]) -> None:
    lytic, blastic = (hu_inside(trunks, value) for value in (LYTIC, BLASTIC))
    mixed = hu_inside([make_bone(3, index, grid=GRID) for index in (16, 22)], MIXED)  # two that have a large one
    assert 10 < np.median(lytic) < 90
    assert 600 < np.median(blastic) < 885
    assert np.percentile(mixed, 10) < 150
    assert np.percentile(mixed, 90) > 400


def test_every_case_has_lesions_and_their_sizes_spread_over_orders_of_magnitude(trunks: list[MadeCase]) -> None:
    volumes = [lesion_ml(case) for case in trunks]
    assert all(1 <= len(ml) <= 5 for ml in volumes)
    assert {1, 2} < {len(ml) for ml in volumes}
    every = np.concatenate(volumes)
    assert every.max() > 12
    assert every.max() < 60
    assert every.min() < 0.4
    assert all(ml.max() > 6 for ml in volumes)


def test_volumes_are_those_wanted_whatever_the_size_of_the_patient() -> None:
    """The largest lesion is drawn from 8 to 45 ml; the bone may allow a little less."""
    largest = [lesion_ml(make_bone(1, index, grid=GRID)).max() for index in range(6)]
    assert min(largest) > 6
    assert max(largest) < 50
    assert sum(ml > 7.5 for ml in largest) >= 5


def test_lesions_lie_in_or_at_bone(trunks: list[MadeCase]) -> None:
    for case in trunks:
        near_bone = ndimage.binary_dilation(case.mask(VALUE["bone"], LOOK_ALIKE).array, iterations=5)
        lesion = case.mask(*LESION_VALUES).array == 1
        parts, count = ndimage.label(lesion, np.ones((3, 3, 3)))
        assert all(near_bone[parts == n].any() for n in range(1, count + 1))


def test_look_alikes_are_not_labelled(trunks: list[MadeCase]) -> None:
    for case in trunks:
        look_alike = case.mask(LOOK_ALIKE).array
        assert look_alike.any()
        assert not (look_alike & case.mask(*LESION_VALUES).array).any()
    assert max(case.image.array.max() for case in trunks) > 885  # a bone island is denser than any lesion


def test_a_threshold_does_not_find_lytic_lesions(trunks: list[MadeCase]) -> None:
    """They are as dense as muscle; only blastic ones stand out."""
    for case in trunks:
        hu, lesion = case.image.array, case.mask(LYTIC).array == 1
        if lesion.any():
            low, high = np.percentile(hu[lesion], [5, 95])
            alike = (hu >= low) & (hu <= high)
            assert 2 * (alike & lesion).sum() / (alike.sum() + lesion.sum()) < 0.1


def test_the_same_patient_on_any_axis_order() -> None:
    center, sizes = (10.0, -150.0, 700.0), {"L": 80, "R": 80, "P": 60, "A": 60, "S": 56, "I": 56}
    straight = make_bone(4, 0, grid=centered_grid((80, 60, 56), (4.6, 4.6, 4.6), "LPS", center_mm=center))
    for codes in ("IRP", "PSL", "RAS"):
        grid = centered_grid(tuple(sizes[c] for c in codes), (4.6, 4.6, 4.6), codes, center_mm=center)
        turned = make_bone(4, 0, grid=grid)
        assert turned.organs.geometry.axis_codes == codes
        assert np.array_equal(to_ras(straight.organs).array, to_ras(turned.organs).array)


def test_default_scans_come_in_many_orientations() -> None:
    grids = [plan_bone(0, index).geometry for index in range(40)]
    assert len({grid.axis_codes for grid in grids}) > 8
    assert all(np.prod(grid.size) < 8.3e6 for grid in grids)


def test_written_set_is_a_manifest_of_bone_lesions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = centered_grid((40, 30, 28), (9.0, 9.0, 9.0), "LAS")
    monkeypatch.setattr("ctseg.sources.phantom_bone.make_bone", lambda s, i: make_bone(s, i, grid=grid))
    counts = {"training": 1, "validation": 1, "testing": 1, "test": 1}
    manifest = check_files(read_manifest(write_made(tmp_path, bone_data(), counts, 0, lambda _: None)))
    assert manifest.name == "phantom_bone"
    assert manifest.labels == {"1": "bone lesion"}
    assert [case.name for case in manifest.cases] == [f"phantom_bone_{n:03d}" for n in range(4)]
