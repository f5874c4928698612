"""`prepare` and `restore`: voxel by voxel what MONAI's transforms and their inverses give."""

import itertools
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.data.utils import compute_shape_offset, zoom_affine
from monai.transforms import Compose, Invertd, Orientationd, ScaleIntensityRanged, Spacingd
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.nn import functional

from ctseg import preprocess
from ctseg.arrays import HOST
from ctseg.engine.arrival import arriving
from ctseg.errors import ImageError
from ctseg.io.images import read_image, read_labels
from ctseg.preprocess import Prepared, network_geometry, prepare, prepare_labels, restored_planes
from ctseg.specs import Preprocess
from ctseg.volume import Geometry, Volume, to_ras

LABELS = (("L", "R"), ("P", "A"), ("I", "S"))
"""Orientationd's default, which MONAI warns about unless it is given."""
CPU = torch.device("cpu")
SPEC = Preprocess(spacing_mm=(1.5, 1.5, 2.0), hu_window=(-57.0, 164.0), crop_foreground=False)
SIZE = (19, 24, 15)
SPACING_MM = (0.83, 1.7, 3.1)
ORIENTATIONS = ["".join(c) for axes in itertools.permutations(("RL", "AP", "SI")) for c in itertools.product(*axes)]
TILTS = [(30, 0, 0), (0, -25, 0), (0, 0, 12), (30, -30, 30), (-8, 17, 29)]
GRIDS = {
    "equal": (SIZE, (1.5, 1.5, 2.0)),
    "almost_equal": (SIZE, (1.5009, 1.4992, 2.0003)),
    "finer": (SIZE, (0.41, 0.61, 0.71)),
    "coarser": (SIZE, (4.1, 3.3, 7.3)),
    "half": ((20, 24, 16), (0.75, 0.75, 5.0)),
    "slice": ((19, 24, 1), SPACING_MM),
    "plane_in_x": ((1, 24, 15), SPACING_MM),
    "voxel": ((1, 1, 1), SPACING_MM),
}
REAL = [
    "totalsegmentator_example/example_ct.nii.gz",
    "msd_spleen8/imagesTr/spleen_8.nii.gz",
    "nifti_orientations/PIR.nii.gz",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in (
            "crlm_abdomen/CRLM-CT-1004_ct.nii.gz",
            "crlm_abdomen/CRLM-CT-1006_ct.nii.gz",
            "lidc_chest/LIDC-IDRI-0001_ct.nii.gz",
        )
    ),
]


def direction(codes: str, tilt_degrees: Sequence[float] = (0, 0, 0)) -> NDArray[np.float64]:
    """Columns in LPS: the axes that `codes` name, turned about the patient's axes."""
    axes = {"L": (1, 0, 0), "R": (-1, 0, 0), "P": (0, 1, 0), "A": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
    turn: NDArray[np.float64] = Rotation.from_euler("xyz", tilt_degrees, degrees=True).as_matrix()
    return turn @ np.array([axes[c] for c in codes], dtype=float).T


def grid_of(
    size: tuple[int, int, int] = SIZE,
    spacing_mm: tuple[float, float, float] = SPACING_MM,
    codes: str = "LPS",
    tilt_degrees: Sequence[float] = (0, 0, 0),
    *,
    as_in_nifti: bool = False,
) -> Geometry:
    """A grid somewhere off the origin; `as_in_nifti` with the float32 affine that a NIfTI header holds."""
    grid = Geometry.from_parts(size, spacing_mm, (-71.3, 40.9, 1012.7), direction(codes, tilt_degrees))
    return Geometry(size, grid.affine.astype(np.float32).astype(np.float64)) if as_in_nifti else grid


def restore(scores_CXYZ: Tensor, prepared: Prepared, scratch: Path | None = None) -> NDArray[np.uint8]:
    """The mask, which must come as the same plane by plane."""
    mask = preprocess.restore(scores_CXYZ, prepared, scratch)
    np.testing.assert_array_equal(np.concatenate(list(restored_planes(scores_CXYZ, prepared))).T, mask)
    return mask


def noise(grid: Geometry) -> Volume:
    """Voxels that share nothing with their neighbours, so that any wrong position shows."""
    return Volume(np.random.default_rng(3).integers(-300, 400, grid.size, dtype=np.int16), grid)


class Monai:
    """MONAI's chain for one volume: its input to the network, and its way back."""

    def __init__(self, volume: Volume, spec: Preprocess = SPEC, mode: str = "bilinear") -> None:
        values = torch.from_numpy(volume.array.astype(np.float32))[None]
        self.chain = Compose(
            [Orientationd("image", "RAS", labels=LABELS), Spacingd("image", spec.spacing_mm, mode=mode)]
        )
        self.resampled = self.chain({"image": MetaTensor(values, affine=torch.from_numpy(volume.geometry.affine_ras))})
        low, high = spec.hu_window
        self.image: MetaTensor = ScaleIntensityRanged("image", low, high, 0.0, 1.0, clip=True)(self.resampled)["image"]

    def restored(self, probabilities_CXYZ: Tensor) -> Tensor:
        """Probabilities on the volume's own grid, by linear interpolation."""
        inverse = Invertd("scores", self.chain, "image", nearest_interp=False)
        back: Tensor = inverse({**self.resampled, "scores": MetaTensor(probabilities_CXYZ)})["scores"]
        return back.as_tensor() if isinstance(back, MetaTensor) else back


class Arriving:
    """The planes of a volume as a file gives them: in order, each once."""

    def __init__(self, volume: Volume) -> None:
        self.geometry = volume.geometry
        self.finished = False
        self._planes, self._asked = volume.array.T, (0, 0)

    def planes(self, first: int, stop: int) -> NDArray[Any]:
        assert self._asked[0] <= first < stop <= len(self._planes)
        assert self._asked[1] <= stop
        self._asked = (first, stop)
        return self._planes[first:stop].copy()

    def finish(self) -> None:
        self.finished = True


def prepare_streamed(stream: Arriving, spec: Preprocess, scratch: Path | None = None) -> Prepared:
    with arriving(stream, spec, CPU, scratch) as (prepared, arrival):
        arrival.wait_for_end()
    return prepared


def assert_same_input(volume: Volume, spec: Preprocess = SPEC) -> None:
    prepared, monai = prepare(volume, spec, CPU), Monai(volume, spec)
    assert prepared.source is volume.geometry
    assert prepared.image_XYZ.dtype == torch.float32
    assert tuple(prepared.image_XYZ.shape) == prepared.geometry.size == tuple(monai.image.shape[1:])
    np.testing.assert_allclose(prepared.geometry.affine_ras, np.asarray(monai.image.affine), rtol=0, atol=1e-6)
    torch.testing.assert_close(prepared.image_XYZ, monai.image[0].as_tensor(), rtol=0, atol=1e-5)
    stream = Arriving(volume)
    streamed = prepare_streamed(stream, spec)
    assert stream.finished
    torch.testing.assert_close(streamed.image_XYZ, monai.image[0].as_tensor(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_every_orientation_is_prepared_as_by_monai(codes: str) -> None:
    assert_same_input(noise(grid_of(codes=codes)))


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SLA", "PIR"])
@pytest.mark.parametrize("tilt_degrees", TILTS)
def test_oblique_grids_are_prepared_as_by_monai(codes: str, tilt_degrees: tuple[int, ...]) -> None:
    assert_same_input(noise(grid_of(codes=codes, tilt_degrees=tilt_degrees)))


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("codes", ["RAS", "LPS"])
def test_every_kind_of_grid_is_prepared_as_by_monai(kind: str, codes: str) -> None:
    assert_same_input(noise(grid_of(*GRIDS[kind], codes)))


def nifti_noise(grid: Geometry) -> Volume:
    """Voxels for a grid whose axes float32 has bent by 1e-7: smooth, as the bend moves samples by 1e-6 voxels."""
    return Volume(ndimage.gaussian_filter(noise(grid).array.astype(np.float32), 1.0), grid)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SLA", "PIR"])
@pytest.mark.parametrize("tilt_degrees", TILTS)
def test_oblique_nifti_headers_are_prepared_as_by_monai(codes: str, tilt_degrees: tuple[int, ...]) -> None:
    assert_same_input(nifti_noise(grid_of(codes=codes, tilt_degrees=tilt_degrees, as_in_nifti=True)))


def test_some_oblique_nifti_headers_make_monai_align_the_middles() -> None:
    """Otherwise the test above would not cover that case."""
    grids = [grid_of(codes="LPS", tilt_degrees=tilt, as_in_nifti=True) for tilt in TILTS]
    apart_mm = [
        np.abs(np.asarray(Monai(noise(g)).image.affine)[:3, 3] - to_ras(noise(g)).geometry.affine_ras[:3, 3]).max()
        for g in grids
    ]
    assert max(apart_mm) > 0.1


def test_network_grid_is_monais_for_random_grids() -> None:
    """Spacings with many ties in the rounding of the size, large sizes, oblique axes, float32 headers."""
    rng = np.random.default_rng(0)
    for n in range(400):
        x, y, z = (int(size) for size in rng.integers(1, 600, 3))
        spacing_mm = (rng.choice([0.5, 0.75, 0.9766]), rng.choice([0.75, 0.8, 1.5004]), rng.choice([1.0, 3.0, 5.0]))
        tilt = rng.uniform(-30, 30, 3) if n % 2 else (0, 0, 0)
        grid = grid_of((x, y, z), spacing_mm, ORIENTATIONS[n % 48], tilt, as_in_nifti=n % 3 > 0)
        source = to_ras(Volume(np.broadcast_to(0, grid.size), grid)).geometry
        kept = np.where(
            np.abs(np.subtract(source.spacing_mm, SPEC.spacing_mm)) <= 1e-3, source.spacing_mm, SPEC.spacing_mm
        )
        affine = zoom_affine(source.affine_ras, kept, diagonal=False)
        size, affine[:3, 3] = compute_shape_offset(source.size, source.affine_ras, affine)
        ours = network_geometry(grid, SPEC)
        assert ours.size == tuple(size)
        np.testing.assert_allclose(ours.affine_ras, affine, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", REAL)
def test_real_volumes_are_prepared_as_by_monai(real_data: Path, name: str) -> None:
    assert_same_input(read_image(real_data / name))


def layouts(array: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Equal arrays that lie differently in memory."""
    frozen = array.copy(order="F")
    frozen.flags.writeable = False
    wide = np.zeros((*array.shape[:2], 2 * array.shape[2]), dtype=array.dtype)
    wide[..., ::2] = array
    return {
        "C": np.ascontiguousarray(array),
        "F": np.asfortranarray(array),
        "mixed": np.ascontiguousarray(array.transpose(1, 2, 0)).transpose(2, 0, 1),
        "backwards": np.ascontiguousarray(array[::-1, :, ::-1])[::-1, :, ::-1],
        "every_second": wide[..., ::2],
        "read_only": frozen,
    }


@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "u4", "f4", "f8", ">i2", ">f4"])
@pytest.mark.parametrize("layout", ["C", "F", "mixed", "backwards", "every_second", "read_only"])
def test_type_and_memory_layout_do_not_matter(dtype: str, layout: str) -> None:
    array = np.random.default_rng(3).integers(0, 256, SIZE, dtype=np.int16)
    grid = grid_of(codes="PIR")
    expected = prepare(Volume(array, grid), SPEC, CPU).image_XYZ
    given = layouts(array.astype(dtype))[layout]
    before = given.copy()
    torch.testing.assert_close(prepare(Volume(given, grid), SPEC, CPU).image_XYZ, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(given, before)


@pytest.mark.parametrize("dtype", ["u2", "u4", "i4", "f8"])
def test_values_beyond_int16_are_clipped_not_wrapped(dtype: str) -> None:
    values = np.array([0, 40_000, 65_000], dtype=dtype).reshape(3, 1, 1)
    image = prepare(Volume(values, grid_of((3, 1, 1), (1.5, 1.5, 2.0), "RAS")), SPEC, CPU).image_XYZ
    torch.testing.assert_close(image.flatten(), torch.tensor([57 / 221, 1.0, 1.0]))


def test_window_is_clipped_to_0_and_1() -> None:
    values = np.array([-1024, -57, 53.5, 164, 3071], dtype=np.float32).reshape(5, 1, 1)
    image = prepare(Volume(values, grid_of((5, 1, 1), (1.5, 1.5, 2.0), "RAS")), SPEC, CPU).image_XYZ
    torch.testing.assert_close(image.flatten(), torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


@pytest.mark.parametrize("slab_voxels", [1, 500, 1200])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("tilt_degrees", [(0, 0, 0), (-8, 17, 29)])
def test_slabs_give_the_whole_volume(
    monkeypatch: pytest.MonkeyPatch, slab_voxels: int, order: str, tilt_degrees: tuple[int, ...]
) -> None:
    """Along the slowest axis of memory: the first (C), here made coarser, or the last (F), made finer."""
    volume = nifti_noise(grid_of(codes="SLA", tilt_degrees=tilt_degrees, as_in_nifti=True))
    volume = replace(volume, array=np.array(volume.array, order=order))
    whole = prepare(volume, SPEC, CPU)
    scores = smooth_scores(whole.geometry.size, 3)
    one, several = restore(scores[1:2] - 0.4, whole), restore(scores, whole)
    monkeypatch.setattr(preprocess, "SLAB_VOXELS", slab_voxels)
    assert torch.equal(prepare(volume, SPEC, CPU).image_XYZ, whole.image_XYZ)
    np.testing.assert_array_equal(restore(scores[1:2] - 0.4, whole), one)
    np.testing.assert_array_equal(restore(scores, whole), several)


@pytest.mark.parametrize("cpus", [1, 4])
@pytest.mark.parametrize("on_disk", [False, True])
def test_the_number_of_cpus_does_not_matter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cpus: int, on_disk: bool
) -> None:
    """Many pieces at once, and what lies on disk released by one thread while others read beside it."""
    volume = nifti_noise(grid_of((40, 36, 30), codes="SLA"))
    whole = prepare(volume, SPEC, CPU)
    scores = smooth_scores(whole.geometry.size, 3)
    one, several = restore(scores[1:2] - 0.4, whole), restore(scores, whole)
    monkeypatch.setattr("ctseg.workers.available_cpus", lambda: cpus)
    monkeypatch.setattr(preprocess, "SLAB_VOXELS", 4 * 3 * 40 * 36)
    scratch = tmp_path if on_disk else None
    assert torch.equal(prepare(volume, SPEC, CPU, scratch).image_XYZ, whole.image_XYZ)
    for codes in ("SLA", "LPS", "LPI"):  # along the patient, it takes the planes in order or in reverse
        in_file_order = Volume(np.asfortranarray(volume.array), grid_of((40, 36, 30), codes=codes))
        streamed = prepare_streamed(Arriving(in_file_order), SPEC, scratch).image_XYZ
        assert torch.equal(streamed, prepare(in_file_order, SPEC, CPU).image_XYZ)
    np.testing.assert_array_equal(restore(scores[1:2] - 0.4, whole, scratch), one)
    np.testing.assert_array_equal(restore(scores, whole, scratch), several)


def test_a_grid_too_large_to_be_a_ct_is_refused() -> None:
    """64^3 voxels that claim a metre each: without the check torch would be asked for 220 TB."""
    grid = grid_of((64, 64, 64), (1000.0, 1000.0, 1000.0))
    with pytest.raises(ImageError) as caught:
        prepare(Volume(np.broadcast_to(np.int16(0), grid.size), grid), SPEC, CPU)
    message = str(caught.value)
    assert "\n" not in message
    assert "at most 1073741824 voxels, got 42001 x 42001 x 31501" in message
    assert "1000 x 1000 x 1000 mm" in message
    assert "correct the spacing" in message


def test_a_large_but_possible_grid_is_accepted() -> None:
    """A whole body in slices of 0.5 mm, a billion voxels."""
    grid = grid_of((512, 512, 4000), (0.98, 0.98, 0.5), "RAS")
    assert network_geometry(grid, replace(SPEC, spacing_mm=grid.spacing_mm)).size == grid.size


# Labels


def label_grids() -> list[Any]:
    grids = {codes: grid_of(codes=codes) for codes in ORIENTATIONS}
    for n, tilt in enumerate(TILTS):
        grids[f"tilt{n}"] = grid_of(codes="SLA", tilt_degrees=tilt)
        # A size without ties: where MONAI aligns the middles, most have some there.
        grids[f"nifti_tilt{n}"] = grid_of((20, 28, 16), codes="SLA", tilt_degrees=tilt, as_in_nifti=True)
    grids |= {kind: grid_of(*grid, "LPS") for kind, grid in GRIDS.items()}
    return [pytest.param(grid, id=name) for name, grid in grids.items()]


@pytest.mark.parametrize("grid", label_grids())
def test_labels_are_those_of_monais_nearest_neighbour(grid: Geometry) -> None:
    labels = Volume(np.random.default_rng(4).integers(0, 4, grid.size, dtype=np.uint8), grid)
    ours = prepare_labels(labels, SPEC)
    assert ours.dtype == np.uint8
    assert ours.flags.c_contiguous
    monai = np.asarray(Monai(labels, mode="nearest").resampled["image"])[0]
    np.testing.assert_array_equal(ours, monai)


def test_labels_differ_from_monais_at_ties_only() -> None:
    """1 mm to 1.5 mm: every second voxel along x lies halfway between two; the even one is taken."""
    grid = grid_of(SIZE, (1.0, 1.7, 3.1), "RAS")
    labels = Volume(np.random.default_rng(4).integers(0, 4, SIZE, dtype=np.uint8), grid)
    ours = prepare_labels(labels, SPEC)
    monai = np.asarray(Monai(labels, mode="nearest").resampled["image"])[0]
    np.testing.assert_array_equal(ours[::2], monai[::2])
    expected = labels.array[[0, 2, 3, 4, 6, 8, 9, 10, 12, 14, 15, 16, 18]]
    np.testing.assert_array_equal(ours[:, 0, 0], expected[:, 0, 0])


def test_real_labels_are_those_of_monais_nearest_neighbour(real_data: Path) -> None:
    labels = read_labels(real_data / "msd_spleen8/labelsTr/spleen_8.nii.gz")
    ours = prepare_labels(labels, SPEC)
    assert ours.any()
    np.testing.assert_array_equal(ours, np.asarray(Monai(labels, mode="nearest").resampled["image"])[0])


# The way back


def smooth_scores(size: tuple[int, int, int], channels: int) -> Tensor:
    """Random probabilities [C, X, Y, Z] that vary over a few voxels."""
    coarse = torch.randn((1, channels, *(n // 3 + 1 for n in size)), generator=torch.Generator().manual_seed(5))
    return torch.softmax(2 * functional.interpolate(coarse, size, mode="trilinear")[0], dim=0)


def assert_same_mask(volume: Volume, channels: int) -> None:
    """Every differing voxel is a tie of the two best scores, and next to none is one."""
    prepared, monai = prepare(volume, SPEC, CPU), Monai(volume)
    scores = smooth_scores(prepared.geometry.size, channels)
    ours = restore(scores[1:] - scores[:1] if channels == 2 else scores, prepared)
    assert ours.dtype == np.uint8
    assert ours.flags.f_contiguous
    back = monai.restored(scores)
    assert ours.shape == back.shape[1:]
    differs = torch.from_numpy(ours).long() != back.argmax(0)
    best, second = back.topk(2, dim=0).values
    assert bool(((best - second)[differs] < 1e-5).all())
    assert int(differs.sum()) <= 1e-4 * ours.size
    assert len(np.unique(ours)) > 1 or ours.size == 1


@pytest.mark.parametrize("channels", [2, 3])
@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_every_orientation_is_restored_as_by_monai(codes: str, channels: int) -> None:
    assert_same_mask(noise(grid_of(codes=codes)), channels)


@pytest.mark.parametrize("channels", [2, 3])
@pytest.mark.parametrize("as_in_nifti", [False, True])
@pytest.mark.parametrize("tilt_degrees", TILTS)
def test_oblique_grids_are_restored_as_by_monai(
    tilt_degrees: tuple[int, ...], as_in_nifti: bool, channels: int
) -> None:
    assert_same_mask(noise(grid_of(codes="PIR", tilt_degrees=tilt_degrees, as_in_nifti=as_in_nifti)), channels)


@pytest.mark.parametrize("channels", [2, 3])
@pytest.mark.parametrize("kind", GRIDS)
def test_every_kind_of_grid_is_restored_as_by_monai(kind: str, channels: int) -> None:
    assert_same_mask(noise(grid_of(*GRIDS[kind], "LPS")), channels)


@pytest.mark.parametrize("name", REAL)
def test_real_grids_are_restored_as_by_monai(real_data: Path, name: str) -> None:
    assert_same_mask(read_image(real_data / name), channels=2)


def restored_whole(scores_CXYZ: Tensor, prepared: Prepared) -> NDArray[np.intp]:
    """The same decision from scores interpolated at every voxel, without a box."""
    matrix = np.linalg.solve(prepared.geometry.affine, prepared.source.affine)
    background = torch.zeros_like(scores_CXYZ) if len(scores_CXYZ) == 1 else scores_CXYZ[:0]
    back = [
        ndimage.affine_transform(
            channel.double().numpy(), matrix, output_shape=prepared.source.size, order=1, mode="nearest"
        )
        for channel in torch.cat([background, scores_CXYZ])
    ]
    return np.argmax(back, axis=0)


CORNERS = list(itertools.product((0, -1), repeat=3))
SPOTS = [
    *CORNERS,
    *((4, 5, n) for n in (0, -1)),
    *((4, n, 3) for n in (0, -1)),
    *((n, 5, 3) for n in (0, -1)),
    (4, 5, 3),
]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("spacing_mm", [SPACING_MM, (0.6, 0.7, 0.9), (4.0, 5.0, 6.0)])
@pytest.mark.parametrize("spot", SPOTS)
def test_one_scored_voxel_is_found_wherever_it_lies(
    spot: tuple[int, int, int], spacing_mm: tuple[float, float, float], channels: int
) -> None:
    grid = grid_of((27, 22, 19), spacing_mm, "SLA", (-8, 17, 29), as_in_nifti=True)
    prepared = Prepared(torch.empty(0), network_geometry(grid, SPEC), grid)
    scores = torch.full((channels, *prepared.geometry.size), -0.13)
    scores[0] = -0.13 if channels == 1 else 0.0
    scores[(-1, *spot)] = 0.87
    ours = restore(scores, prepared)
    np.testing.assert_array_equal(ours, restored_whole(scores, prepared))
    assert ours.any() or max(spacing_mm) > 1.0  # coarse source voxels may step over one of the network's


@pytest.mark.parametrize("channels", [1, 3])
def test_scattered_labels_are_restored_as_on_the_whole_grid(channels: int) -> None:
    grid = grid_of((27, 22, 19), SPACING_MM, "PIR")
    prepared = Prepared(torch.empty(0), network_geometry(grid, SPEC), grid)
    rng = np.random.default_rng(6)
    for share in (0.0005, 0.01, 0.3):
        scored = rng.random((channels, *prepared.geometry.size)) < share
        scores = torch.from_numpy(np.where(scored, 0.9, -0.37) + rng.uniform(0, 0.01, scored.shape)).float()
        np.testing.assert_array_equal(restore(scores, prepared), restored_whole(scores, prepared))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("label", [0, 1])
def test_all_or_nothing(channels: int, label: int) -> None:
    grid = grid_of(codes="IPR", tilt_degrees=(30, -30, 30))
    prepared = Prepared(torch.empty(0), network_geometry(grid, SPEC), grid)
    scores = torch.zeros((channels, *prepared.geometry.size))
    scores[-1 if label else 0] += 0.5 if label or channels == 3 else -0.5
    np.testing.assert_array_equal(restore(scores, prepared), np.full(SIZE, label * max(channels - 1, 1)))


def test_equal_scores_are_background_or_the_first_label() -> None:
    grid = grid_of((4, 5, 3), SPEC.spacing_mm, "RAS")
    prepared = Prepared(torch.empty(0), network_geometry(grid, SPEC), grid)
    scores = torch.zeros((1, 4, 5, 3))
    scores[0, 0, 0, 0] = scores[0, 3, 4, 2] = 0.1
    assert np.count_nonzero(restore(scores, prepared)) == 2
    assert not restore(torch.full((3, 4, 5, 3), 1 / 3), prepared).any()
    scores = torch.tensor([0.2, 0.4, 0.4]).view(3, 1, 1, 1).expand(3, 4, 5, 3)
    assert (restore(scores, prepared) == 1).all()


def test_labels_up_to_255_fit() -> None:
    grid = grid_of((2, 2, 1), SPEC.spacing_mm, "RAS")
    prepared = Prepared(torch.empty(0), network_geometry(grid, SPEC), grid)
    scores = torch.zeros((256, 2, 2, 1))
    scores[255, 0, 1] = scores[200, 1, 1] = 1.0
    assert restore(scores, prepared)[..., 0].tolist() == [[0, 255], [0, 200]]


def test_the_networks_spacing_keeps_every_voxel() -> None:
    """Nothing is resampled where the grids agree but for the order of axes: masks survive bit by bit."""
    for codes in ORIENTATIONS:
        spacing_mm = {"R": 1.5, "L": 1.5, "A": 1.5, "P": 1.5, "S": 2.0, "I": 2.0}
        grid = grid_of(SIZE, tuple(spacing_mm[c] for c in codes), codes)
        mask = Volume((np.random.default_rng(7).random(SIZE) < 0.3).astype(np.uint8), grid)
        prepared = prepare(mask, replace(SPEC, hu_window=(0.0, 1.0)), CPU)
        np.testing.assert_array_equal(prepared.image_XYZ.numpy(), to_ras(mask).array)
        np.testing.assert_array_equal(prepare_labels(mask, SPEC), to_ras(mask).array)
        np.testing.assert_array_equal(restore(prepared.image_XYZ[None] - 0.5, prepared), mask.array)


@pytest.mark.parametrize("spacing_mm", [(6.0, 6.0, 6.0), (6.0, 6.0, 1.0), (0.8, 0.8, 6.0)])
def test_a_coarse_grid_takes_little_beside_the_result(spacing_mm: tuple[float, float, float]) -> None:
    """A slab of 2^20 values takes 4 MB in float32; a few of them are there at once."""
    size = (512, 512, 200)
    geometry = Geometry.from_parts(size, (0.8, 0.8, 1.0), (0.0, 0.0, 0.0), np.eye(3))
    volume = Volume(np.zeros(size, np.int16, order="F"), geometry)
    tracemalloc.start()
    try:
        prepared = prepare(volume, replace(SPEC, spacing_mm=spacing_mm), HOST)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(prepared.image_XYZ, np.ndarray)
    assert peak_bytes - prepared.image_XYZ.nbytes < 40e6


def test_a_narrow_label_comes_in_small_pieces() -> None:
    """Its box is narrow, so that many planes of it are sampled at once; the CT's own planes are large."""
    size = (256, 256, 1000)
    grid = Geometry.from_parts(size, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), direction("RAS"))
    coarse = Geometry.from_parts((64, 64, 250), (4.0, 4.0, 4.0), (0.0, 0.0, 0.0), direction("RAS"))
    scores_CXYZ = np.full((1, *coarse.size), -1.0, dtype=np.float32)
    scores_CXYZ[0, 30:33, 30:33] = 1.0
    prepared = Prepared(scores_CXYZ[0, :0], coarse, grid)
    expected = preprocess.restore(scores_CXYZ, prepared)
    assert expected.any(axis=(0, 1)).all()
    tracemalloc.start()
    try:
        start = 0
        for piece in restored_planes(scores_CXYZ, prepared):
            assert np.array_equal(piece, expected.T[start : start + len(piece)])
            start += len(piece)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert start == size[2]
    assert peak_bytes < 20e6  # of 65.5 MB
