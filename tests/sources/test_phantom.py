import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from ctseg.errors import CtsegError
from ctseg.manifest import SPLITS, check_files, read_manifest
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


def spacing_lps(plan: ScanPlan) -> tuple[float, ...]:
    """Spacing along left-right, front-back and foot-head, whatever the order of the stored axes."""
    codes = plan.geometry.axis_codes
    return tuple(
        plan.geometry.spacing_mm[next(codes.index(c) for c in pair if c in codes)] for pair in ("LR", "AP", "SI")
    )


def test_default_grids_vary_as_scanners_do() -> None:
    plans = [plan_phantom(0, index) for index in range(60)]
    x, y, slices = np.array([spacing_lps(plan) for plan in plans]).T
    assert np.allclose(x, y)
    assert x.min() >= 0.6
    assert x.max() <= 0.98
    assert np.ptp(x) > 0.25
    assert slices.min() >= 0.7
    assert slices.max() == pytest.approx(5.0)
    assert all(1e6 < np.prod(plan.geometry.size) < 8.2e6 for plan in plans)
    assert all(200 <= plan.body_width_mm <= 238 for plan in plans)
    noise = np.array([plan.noise_hu for plan in plans])
    assert np.median(noise[slices <= 1]) > 1.5 * np.median(noise[slices >= 4])


def test_default_grids_come_in_many_orientations() -> None:
    grids = [plan_phantom(0, index).geometry for index in range(60)]
    codes = {grid.axis_codes for grid in grids}
    assert {"LPS", "LAS", "RAS"} < codes
    assert len(codes) > 8
    assert 3 < sum(np.abs(grid.direction).max(axis=0).min() < 0.9999 for grid in grids) < 30
    assert all(np.allclose(grid.direction @ grid.direction.T, np.eye(3)) for grid in grids)


def test_a_plan_is_the_case_s_plan() -> None:
    phantom = make_phantom(0, 8)
    assert phantom.image.geometry.agrees_with(plan_phantom(0, 8).geometry)
    assert phantom.image.array.shape == phantom.image.geometry.size


@pytest.mark.parametrize("codes", ["LPS", "RAS", "SRA", "PIL"])
def test_centered_grid_lies_around_its_centre(codes: str) -> None:
    grid = centered_grid((5, 8, 11), (1.0, 2.0, 3.0), codes, center_mm=(7.0, -8.0, 9.0), tilt_degrees=(6.0, 2.0, -3.0))
    assert grid.axis_codes == codes
    assert grid.spacing_mm == pytest.approx((1.0, 2.0, 3.0))
    assert grid.affine @ [2, 3.5, 5, 1] == pytest.approx([7, -8, 9, 1])


def test_the_same_patient_on_any_axis_order() -> None:
    """Structures are where they are, however the array is stored."""
    straight = make_phantom(4, 0, size=ADULT, grid=COARSE)
    turned = centered_grid((72, 100, 80), (4.0, 4.0, 4.0), "IRP", center_mm=(10.0, -150.0, 700.0))
    other = make_phantom(4, 0, size=ADULT, grid=turned)
    assert np.array_equal(to_ras(straight.organs).array, to_ras(other.organs).array)


def test_volumes_fit_together(adults: list[Phantom]) -> None:
    for phantom in adults:
        assert phantom.image.array.dtype == np.int16
        assert phantom.organs.array.dtype == np.uint8
        assert phantom.image.geometry is phantom.organs.geometry
        assert phantom.image.array.shape == phantom.organs.array.shape == COARSE.size
        assert np.array_equal(phantom.labels().array, phantom.organs.array == VALUE["spleen"])
        assert phantom.image.array.min() >= -1024
        assert set(np.unique(phantom.organs.array)) == {0, *VALUE.values()}


@pytest.mark.parametrize(
    ("organ", "low", "high"),
    [
        ("spleen", 70, 135),
        ("liver", 65, 130),
        ("left kidney", 80, 200),
        ("right kidney", 80, 200),
        ("aorta", 90, 190),
        ("muscle", 50, 85),
        ("left lung", -900, -790),
        ("right lung", -900, -790),
        ("bone", 130, 420),
        ("pancreas", 55, 130),
    ],
)
def test_organs_have_their_hounsfield_units(adults: list[Phantom], organ: str, low: float, high: float) -> None:
    medians = [np.median(inner(phantom, organ)) for phantom in adults]
    assert low < min(medians)
    assert max(medians) < high
    assert np.ptp(medians) > 2  # patients differ


def test_a_threshold_does_not_find_the_spleen(adults: list[Phantom]) -> None:
    for phantom in adults:
        hu, spleen = phantom.image.array, phantom.organs.array == VALUE["spleen"]
        low, high = np.percentile(hu[spleen], [5, 95])
        alike = (hu >= low) & (hu <= high)
        assert 2 * (alike & spleen).sum() / (alike.sum() + spleen.sum()) < 0.35


def test_the_spleen_lies_where_spleens_lie(adults: list[Phantom]) -> None:
    for phantom in adults:
        organs = phantom.organs.array
        spleen, liver = (center_mm(phantom, organs == VALUE[name]) for name in ("spleen", "liver"))
        body = center_mm(phantom, phantom.image.array > -300)
        assert spleen[0] > body[0] + 50  # left
        assert spleen[1] > body[1]  # at the back
        assert liver[0] < body[0] - 20  # right
        assert center_mm(phantom, organs == VALUE["left lung"])[2] > spleen[2]
        assert center_mm(phantom, organs == VALUE["left kidney"])[2] < spleen[2]


def test_spleens_vary_in_size(adults: list[Phantom]) -> None:
    ml = [phantom.labels().array.sum() * COARSE.voxel_volume_ml for phantom in adults]
    assert min(ml) > 70
    assert max(ml) < 550
    assert max(ml) > 1.4 * min(ml)


def test_default_case_holds_the_whole_spleen() -> None:
    spleen = to_ras(make_phantom(0, 3).labels()).array
    assert not spleen[:, :, [0, -1]].any()
    assert not spleen[[0, -1]].any()
    assert not spleen[:, [0, -1]].any()
    assert spleen.any()


def ball_scan(spacing_mm: tuple[float, float, float], noise_hu: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    grid = centered_grid((40, 40, round(100 / spacing_mm[2])), spacing_mm, "RAS")
    plan = ScanPlan(
        geometry=grid, body_width_mm=340, stretch=(1, 1, 1), turn_degrees=0, center_mm=(0, 0, 0), noise_hu=noise_hu
    )
    ball = Structure(ellipsoid((0, 0, 0), (30, 30, 30)), (Layer(0, 0.0, 7),))
    image, organs = scan([ball], plan, np.random.default_rng(0))
    return image.array, organs.array


def test_edges_are_partial_and_labels_are_the_shape() -> None:
    hu, values = ball_scan((2.5, 2.5, 2.5))
    i, j, k = np.indices(hu.shape) * 2.5 - (np.array(hu.shape) - 1).reshape(3, 1, 1, 1) * 1.25
    radius = np.sqrt(i * i + j * j + k * k)
    clear = np.abs(radius - 30) > 1e-3
    assert np.array_equal((values == 7)[clear], (radius < 30)[clear])
    assert np.abs(hu[radius < 24]).max() < 60  # texture
    assert np.abs(hu[radius > 36] + 1000).max() == 0
    edge = (hu > -800) & (hu < -300)
    assert edge.sum() > 500
    assert np.abs(radius[edge] - 30).max() < 2.5


def test_thick_slices_blur_what_faces_them() -> None:
    thin, thick = (ball_scan((2.5, 2.5, dz))[0] for dz in (1.0, 5.0))
    across = [(column > -950) & (column < -50) for column in (thin[20, 20], thick[20, 20])]
    width_mm = [partial.sum() / 2 * dz for partial, dz in zip(across, (1.0, 5.0), strict=True)]
    assert width_mm[1] >= 5.0
    assert width_mm[0] <= 5.0


def test_noise_is_there_and_correlated() -> None:
    clean, noisy = (ball_scan((2.5, 2.5, 2.5), noise)[0].astype(float) for noise in (0.0, 20.0))
    noise = (noisy - clean)[12:28, 12:28, 12:28]
    assert 15 < noise.std() < 30
    assert 0.3 < np.corrcoef(noise[1:].ravel(), noise[:-1].ravel())[0, 1] < 0.7
    assert 0.1 < np.corrcoef(noise[..., 1:].ravel(), noise[..., :-1].ravel())[0, 1] < 0.6


@pytest.mark.parametrize(
    ("shape", "volume_mm3"),
    [
        (ellipsoid((3, -2, 1), (20, 12, 16), (20, -30, 40)), 4 / 3 * np.pi * 20 * 12 * 16),
        (tube((2, -1), (15, 10), -12, 20), np.pi * 15 * 10 * 32),
        (capsule((-10, -5, -8), (12, 4, 9), 8), np.pi * 64 * np.hypot(22, np.hypot(9, 17)) + 4 / 3 * np.pi * 512),
    ],
)
def test_shapes_have_their_volume_and_box(shape: Shape, volume_mm3: float) -> None:
    axis = np.arange(-40, 40, dtype=np.float32) + np.float32(0.5)
    field: FloatArray = shape.distance(axis[:, None, None], axis[None, :, None], axis[None, None, :])
    assert field.dtype == np.float32
    assert (field < 0).sum() == pytest.approx(volume_mm3, rel=0.02)
    inside = np.argwhere(field < 0) - 39.5
    assert (inside.min(axis=0) >= np.array(shape.low_mm)).all()
    assert (inside.max(axis=0) <= np.array(shape.high_mm)).all()
    slope = np.sqrt(sum(g**2 for g in np.gradient(field)))
    assert np.median(slope[np.abs(field) < 1]) == pytest.approx(1.0, abs=0.1)


def test_the_higher_dome_counts() -> None:
    domes = below_domes([((-50, 0, 60), (40, 50, 50)), ((50, 0, 40), (40, 50, 50))])
    x = np.array([-50.0, 50.0, -50.0], np.float32)
    z = np.array([60.0, 40.0, 50.0], np.float32)
    assert domes.distance(x, np.zeros(3, np.float32), z) == pytest.approx([0, 0, -10])


def test_written_set_is_a_manifest(tmp_path: Path, tiny_cases: list[tuple[int, int]]) -> None:
    told: list[str] = []
    path = write_phantoms(tmp_path / "data", COUNTS, 9, told.append)
    manifest = check_files(read_manifest(path))
    assert path == tmp_path / "data" / "manifest.json"
    assert {split: len(manifest.split(split)) for split in COUNTS} == COUNTS
    assert [case.name for case in manifest.cases] == told == [f"phantom_{index:03d}" for index in range(5)]
    assert manifest.labels == {"1": "spleen"}
    assert manifest.licence.startswith("CC0")
    assert [case.label is None for case in manifest.cases] == [False] * 4 + [True]
    assert tiny_cases == [(9, index) for index in range(5)]


def test_written_files_agree(tmp_path: Path, tiny_cases: list[tuple[int, int]]) -> None:
    manifest = read_manifest(write_phantoms(tmp_path, COUNTS, 9, lambda _: None))
    for case in manifest.cases[:4]:
        assert case.label is not None
        image, label, organs = (
            nibabel.load(file) for file in (case.image, case.label, tmp_path / "organs" / case.image.name)
        )
        assert np.array_equal(image.affine, label.affine)
        assert np.allclose(image.get_qform(), image.affine, atol=1e-3)
        assert (image.header["sform_code"], image.header["qform_code"]) == (1, 1)
        assert image.header.get_xyzt_units()[0] == "mm"
        assert (image.get_data_dtype(), label.get_data_dtype()) == (np.int16, np.uint8)
        assert np.array_equal(np.asarray(label.dataobj), np.asarray(organs.dataobj) == 1)
        assert np.asarray(label.dataobj).any()
        left_of_body = image.affine[0] @ [*np.argwhere(np.asarray(label.dataobj)).mean(axis=0), 1]
        assert left_of_body < -40  # NIfTI is RAS: the left is negative


def test_a_stopped_run_resumes(tmp_path: Path, tiny_cases: list[tuple[int, int]]) -> None:
    write_phantoms(tmp_path, COUNTS, 9, lambda _: None)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.nii.gz")}
    removed = tmp_path / "imagesTr" / "phantom_001.nii.gz"
    content = removed.read_bytes()
    removed.unlink()
    tiny_cases.clear()
    told: list[str] = []
    write_phantoms(tmp_path, COUNTS, 9, told.append)
    assert tiny_cases == [(9, 1)]
    assert len(told) == 5
    assert [file for file, time in before.items() if file.stat().st_mtime_ns != time] == [removed]
    assert removed.read_bytes() == content


def test_more_cases_leave_the_first_ones_alone(tmp_path: Path, tiny_cases: list[tuple[int, int]]) -> None:
    write_phantoms(tmp_path, {"training": 1}, 9, lambda _: None)
    write_phantoms(tmp_path, {"training": 2}, 9, lambda _: None)
    assert tiny_cases == [(9, 0), (9, 1)]


@pytest.mark.parametrize("key", ["seed", "generator_version", "name"])
def test_another_data_set_is_not_overwritten(tmp_path: Path, tiny_cases: list[tuple[int, int]], key: str) -> None:
    path = write_phantoms(tmp_path, {"training": 1}, 9, lambda _: None)
    path.write_text(json.dumps({**json.loads(path.read_text()), key: "other"}))
    with pytest.raises(CtsegError, match=r"another data set.*choose another folder"):
        write_phantoms(tmp_path, {"training": 1}, 9, lambda _: None)


def test_an_unreadable_manifest_is_told(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(CtsegError, match="cannot be read"):
        write_phantoms(tmp_path, {"training": 1}, 9, lambda _: None)


def test_the_demo_has_cases_of_every_split() -> None:
    assert set(DEMO_COUNTS) == set(SPLITS)
    assert all(count >= 2 for count in DEMO_COUNTS.values())  # a standard deviation needs two
