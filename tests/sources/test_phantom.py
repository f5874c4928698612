import json
from itertools import pairwise
from pathlib import Path

import nibabel
import numpy as np
import pytest

from ctseg.errors import CtsegError
from ctseg.manifest import check_files, read_manifest
from ctseg.sources.phantom import (
    ADULT,
    DEMO_COUNTS,
    ORGANS,
    Phantom,
    PhantomSize,
    centered_grid,
    make_phantom,
    plan_phantom,
    write_phantoms,
)
from ctseg.sources.phantom_plan import ScanPlan
from ctseg.sources.phantom_scan import scan
from ctseg.sources.phantom_shapes import FloatArray, Shape, below_domes, capsule, ellipsoid, tube
from ctseg.sources.phantom_tissue import Layer, Structure
from ctseg.volume import to_ras

COARSE = centered_grid((100, 80, 72), (4.0, 4.0, 4.0), "LPS", center_mm=(10.0, -150.0, 700.0))
VALUE = {name: int(value) for value, name in ORGANS.items()}
COUNTS = {"training": 2, "validation": 1, "testing": 1, "test": 1}


@pytest.fixture(scope="module")
def adults() -> list[Phantom]:
    return [make_phantom(3, index, size=ADULT, grid=COARSE) for index in range(6)]


@pytest.fixture
def tiny_cases(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Makes `write_phantoms` quick; the list fills with the cases that are made."""
    made = []

    def make(seed: int, index: int, size: PhantomSize = ADULT) -> Phantom:
        made.append((seed, index))
        tilt = (8.0, 0.0, 3.0) if index == 1 else (0.0, 0.0, 0.0)
        grid = centered_grid((25, 30, 21), (12.0, 9.0, 11.0), "LAS", center_mm=(index, 0.0, 0.0), tilt_degrees=tilt)
        return make_phantom(seed, index, size=size, grid=grid)

    monkeypatch.setattr("ctseg.sources.phantom.make_phantom", make)
    return made


def inner(phantom: Phantom, name: str) -> np.ndarray:
    """HU of an organ's voxels whose six neighbours are of the same organ."""
    mask = np.pad(phantom.organs.array == VALUE[name], 1)
    core = mask.copy()
    for axis in range(3):
        core &= np.roll(mask, 1, axis) & np.roll(mask, -1, axis)
    return phantom.image.array[core[1:-1, 1:-1, 1:-1]]


def center_mm(phantom: Phantom, mask: np.ndarray) -> np.ndarray:
    return phantom.organs.geometry.affine[:3] @ [*np.argwhere(mask).mean(axis=0), 1.0]


def test_a_case_depends_on_seed_and_index_alone() -> None:
    make_phantom(5, 0, size=ADULT, grid=COARSE)
    one, again = (make_phantom(5, 1, size=ADULT, grid=COARSE) for _ in range(2))
    assert np.array_equal(one.image.array, again.image.array)
    assert np.array_equal(one.organs.array, again.organs.array)
    for seed, index in ((5, 2), (6, 1)):
        other = make_phantom(seed, index, size=ADULT, grid=COARSE)
        assert not np.array_equal(one.organs.array, other.organs.array)


def test_slabs_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_phantom(5, 1, size=ADULT, grid=COARSE)
    monkeypatch.setattr("ctseg.sources.phantom_scan._SLAB_VOXELS", 1)
    slabs = make_phantom(5, 1, size=ADULT, grid=COARSE)
    assert np.array_equal(whole.organs.array, slabs.organs.array)
    assert np.abs(whole.image.array.astype(int) - slabs.image.array).max() <= 1  # sums in another order


def test_default_grids_vary_as_scanners_do() -> None:
    plans = [plan_phantom(0, index) for index in range(60)]
    grids = [to_ras(type(adult := None) and adult or _empty(plan)).geometry for plan in plans]
    pixels, slices = [g.spacing_mm[0] for g in grids], [g.spacing_mm[2] for g in grids]
    assert min(pixels) >= 0.6
    assert max(pixels) <= 0.98
    assert np.ptp(pixels) > 0.25
    assert min(slices) >= 0.7
    assert max(slices) == pytest.approx(5.0)
    assert all(g.spacing_mm[0] == pytest.approx(g.spacing_mm[1]) for g in grids)
    assert all(1e6 < np.prod(g.size) < 8.2e6 for g in grids)
    assert all(200 <= plan.body_width_mm <= 238 for plan in plans)
    codes = {plan.geometry.axis_codes for plan in plans}
    assert {"LPS", "LAS", "RAS"} < codes
    assert len(codes) > 8
    tilted = [np.abs(plan.geometry.direction).max(axis=0).min() < 0.9999 for plan in plans]
    assert 3 < sum(tilted) < 30
    for plan in plans:
        assert np.allclose(plan.geometry.direction @ plan.geometry.direction.T, np.eye(3))
    thin = [p.noise_hu for p, s in zip(plans, slices, strict=True) if s <= 1]
    thick = [p.noise_hu for p, s in zip(plans, slices, strict=True) if s >= 4]
    assert np.median(thin) > 1.5 * np.median(thick)
