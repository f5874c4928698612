"""Prediction: the right voxels in patient space, and windows placed and averaged as by MONAI."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data.utils import dense_patch_slices
from monai.inferers.inferer import SlidingWindowInferer
from monai.inferers.utils import _get_scan_interval
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from torch import Tensor, nn

from ctseg.engine.model import Forward, Model, forward_of
from ctseg.engine.predict import Placement, predict, scores_from_logits, window_logits
from ctseg.engine.runtime import Runtime
from ctseg.engine.windows import num_windows, window_starts
from ctseg.errors import ModelError, OutputError
from ctseg.recipe import Recipe
from ctseg.specs import Inference
from ctseg.volume import Geometry, Volume

CPU = Runtime(torch.device("cpu"))
ORIENTATIONS = ["".join(c) for axes in itertools.permutations(("RL", "AP", "SI")) for c in itertools.product(*axes)]
AXES = {"L": (1, 0, 0), "R": (-1, 0, 0), "P": (0, 1, 0), "A": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
NETWORK_MM = {"R": 2.0, "L": 2.0, "A": 2.5, "P": 2.5, "S": 3.0, "I": 3.0}
"""The spacing of these tests' recipe along each patient axis."""


@pytest.fixture
def recipe(tiny_recipe: Recipe) -> Recipe:
    """Windows of 16^3 on a grid of 2 x 2.5 x 3 mm."""
    return replace(tiny_recipe, preprocess=replace(tiny_recipe.preprocess, spacing_mm=(2.0, 2.5, 3.0)))


def model_of(recipe: Recipe, forward: Forward, runtime: Runtime = CPU) -> Model:
    return Model(recipe, forward, runtime, Path("model.pt"), "")


def threshold(image_BCXYZ: Tensor) -> Tensor:
    """A network that finds what is brighter than half."""
    return torch.cat([torch.zeros_like(image_BCXYZ), (image_BCXYZ - 0.5) * 4], dim=1)


def marked_ct(
    codes: str,
    size: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    box: tuple[slice, slice, slice],
    tilt_degrees: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> tuple[Volume, NDArray[np.bool_]]:
    """A CT at the lower end of the window with one box at the upper end, and the box."""
    turn = Rotation.from_euler("xyz", tilt_degrees, degrees=True).as_matrix()
    direction = turn @ np.array([AXES[c] for c in codes], dtype=float).T
    marker = np.zeros(size, dtype=bool)
    marker[box] = True
    array = np.where(marker, 164, -57).astype(np.int16)
    return Volume(array, Geometry.from_parts(size, spacing_mm, (-31.0, 12.5, -208.7), direction)), marker


def centre_mm(mask: NDArray[np.generic], grid: Geometry) -> NDArray[np.float64]:
    """Centre of mass in the patient."""
    voxels = np.argwhere(mask).mean(axis=0)
    centre: NDArray[np.float64] = (grid.affine @ [*voxels, 1.0])[:3]
    return centre


def dice(a: NDArray[np.generic], b: NDArray[np.generic]) -> float:
    return 2 * np.count_nonzero(a.astype(bool) & b.astype(bool)) / (np.count_nonzero(a) + np.count_nonzero(b))


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_mask_is_exactly_the_marker_at_the_networks_spacing(recipe: Recipe, codes: str) -> None:
    spacing_mm = tuple(NETWORK_MM[c] for c in codes)
    volume, marker = marked_ct(codes, (21, 18, 25), spacing_mm, (slice(3, 7), slice(9, 17), slice(5, 11)))
    mask = predict(model_of(recipe, threshold), volume)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, marker)


@pytest.mark.parametrize("tilt_degrees", [(0.0, 0.0, 0.0), (30.0, 0.0, 0.0), (-8.0, 17.0, 29.0)])
@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_mask_is_on_the_marker_at_any_spacing(
    recipe: Recipe, codes: str, tilt_degrees: tuple[float, float, float]
) -> None:
    box = (slice(8, 20), slice(30, 41), slice(6, 11))
    volume, marker = marked_ct(codes, (47, 52, 19), (0.9, 0.7, 3.7), box, tilt_degrees)
    mask = predict(model_of(recipe, threshold), volume)
    apart_mm = volume.geometry.direction.T @ (centre_mm(mask, volume.geometry) - centre_mm(marker, volume.geometry))
    assert (np.abs(apart_mm) < [NETWORK_MM[c] / 2 for c in codes]).all()
    assert dice(mask, marker) > 0.8


@pytest.mark.parametrize("size", [(9, 7, 5), (40, 6, 1), (1, 1, 1)])
def test_a_ct_smaller_than_a_window_keeps_its_marker(recipe: Recipe, size: tuple[int, int, int]) -> None:
    volume, marker = marked_ct("SPL", size, (3.0, 2.5, 2.0), (slice(0, 3), slice(0, 2), slice(0, 1)))
    np.testing.assert_array_equal(predict(model_of(recipe, threshold), volume), marker)


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_the_end_of_a_window_is_the_patients_right_upper_front(recipe: Recipe, codes: str) -> None:

    def last_octant(image_BCXYZ: Tensor) -> Tensor:
        logits = torch.zeros((len(image_BCXYZ), 2, 16, 16, 16))
        logits[:, 0] = 10.0
        logits[:, 1, 8:, 8:, 8:] = 20.0
        return logits

    spacing_mm = tuple(NETWORK_MM[c] for c in codes)
    volume, _ = marked_ct(codes, (16, 16, 16), spacing_mm, (slice(0, 1),) * 3)
    mask = predict(model_of(recipe, last_octant), volume)
    assert np.count_nonzero(mask) == 8**3
    middle = centre_mm(np.ones_like(mask), volume.geometry)
    left, back, up = centre_mm(mask, volume.geometry) - middle
    np.testing.assert_allclose([left, back, up], [-4 * 2.0, -4 * 2.5, 4 * 3.0], atol=1e-9)


def test_several_labels_come_back_as_their_values(recipe: Recipe) -> None:
    recipe = replace(recipe, labels={"1": "dim", "2": "bright"})
    volume, marker = marked_ct("PIR", (21, 18, 25), (2.5, 3.0, 2.0), (slice(3, 7), slice(9, 17), slice(5, 11)))
    volume.array[marker] = np.where(np.indices(marker.shape)[1][marker] < 12, 30, 300)  # 30 HU is 0.39 of the window

    def two_thresholds(image_BCXYZ: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(image_BCXYZ), image_BCXYZ * 90 - 20, image_BCXYZ * 200 - 100], dim=1)

    mask = predict(model_of(recipe, two_thresholds), volume)
    np.testing.assert_array_equal(mask, np.where(volume.array == 30, 1, np.where(volume.array == 300, 2, 0)))


def test_progress_counts_every_network_call(recipe: Recipe) -> None:
    volume, _ = marked_ct("RAS", (40, 16, 17), (2.0, 2.5, 3.0), (slice(0, 1),) * 3)
    calls: list[tuple[int, int]] = []
    predict(model_of(recipe, threshold), volume, lambda done, total: calls.append((done, total)))
    # 40 in windows of 16 at a step of 12: 3; 16: 1; 17: 2.
    assert calls == [(n, 6) for n in range(1, 7)]


# On disk


@pytest.fixture
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs so thin that these CTs have many."""
    monkeypatch.setattr("ctseg.preprocess.SLAB_VOXELS", 700)
    monkeypatch.setattr("ctseg.scratch.SLAB_VOXELS", 700)


@pytest.mark.usefixtures("small_slabs")
@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_where_arrays_lie_does_not_matter(recipe: Recipe, codes: str, num_classes: int, tmp_path: Path) -> None:
    model = model_of(labelled(recipe, num_classes), forward_of(small_network(num_classes), CPU))
    volume, _ = marked_ct(codes, (31, 28, 19), (1.3, 1.7, 2.9), (slice(3, 20), slice(9, 17), slice(5, 11)), (5, 0, 9))
    volume.array[...] += np.random.default_rng(0).integers(-40, 40, volume.array.shape, dtype=np.int16)
    expected = predict(model, volume)
    assert len(np.unique(expected)) == num_classes
    for placement in (Placement(volumes=tmp_path), Placement(grids=tmp_path), Placement(tmp_path, tmp_path)):
        np.testing.assert_array_equal(predict(model, volume, placement=placement), expected)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_an_error(recipe: Recipe, mount: Callable[[str], Path]) -> None:
    disk = mount("size=16k")
    volume, _ = marked_ct("RAS", (31, 28, 19), (1.3, 1.7, 2.9), (slice(3, 20), slice(9, 17), slice(5, 11)))
    for placement in (Placement(volumes=disk), Placement(grids=disk)):
        with pytest.raises(OutputError, match=r"cannot write '.*disk': No space left on device"):
            predict(model_of(recipe, threshold), volume, placement=placement)


# Windows


def test_windows_start_where_monais_do() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        x, y, z = (int(n) for n in rng.integers(1, 40, 3))
        shape = (x + int(rng.integers(0, 90)), y + int(rng.integers(0, 90)), z + int(rng.integers(0, 3)))
        overlap = float(rng.choice([0.0, 0.1, 0.25, 0.5, 0.6, 0.9, 0.99]))
        interval = _get_scan_interval(shape, (x, y, z), 3, (overlap,) * 3)
        monai = [tuple(s.start for s in box) for box in dense_patch_slices(shape, (x, y, z), interval)]
        assert list(window_starts(shape, (x, y, z), overlap)) == monai
        inference = Inference(window_size=(x, y, z), overlap=overlap, batch_windows=1)
        assert num_windows(shape, inference) == len(monai)


def small_network(num_classes: int) -> nn.Module:
    """Sees the edges of its window (padding), so that it matters which windows are averaged."""
    torch.manual_seed(1)
    layers = [nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, num_classes, 5, padding=2)]
    return nn.Sequential(*layers).eval()


def labelled(recipe: Recipe, num_classes: int) -> Recipe:
    return replace(recipe, labels={str(n): f"label {n}" for n in range(1, num_classes)})


@pytest.mark.parametrize("num_classes", [2, 3, 5])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
@pytest.mark.parametrize("shape", [(33, 25, 21), (16, 16, 16), (9, 40, 16), (5, 7, 1)])
def test_window_logits_are_monais(
    recipe: Recipe, shape: tuple[int, int, int], overlap: float, num_classes: int
) -> None:
    network = small_network(num_classes)
    model = model_of(labelled(recipe, num_classes), forward_of(network, CPU))
    image_XYZ = torch.rand(shape, generator=torch.Generator().manual_seed(2))
    window = (16, 12, 16)
    ours = window_logits(model, image_XYZ, replace(recipe.inference, window_size=window, overlap=overlap))
    with torch.inference_mode():
        monai = SlidingWindowInferer(window, sw_batch_size=3, overlap=overlap)(image_XYZ[None, None], network)[0]
    if num_classes == 2:
        monai = monai[1:] - monai[:1]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, monai.as_subclass(Tensor), rtol=0, atol=1e-5)


def test_image_is_left_as_it_was(recipe: Recipe) -> None:
    """The caller's tensor may be a view of the prepared case."""
    image_XYZ = torch.rand((20, 9, 16))
    before = image_XYZ.clone()
    window_logits(model_of(recipe, forward_of(small_network(2), CPU)), image_XYZ, recipe.inference)
    assert torch.equal(image_XYZ, before)


@pytest.mark.parametrize("batch_windows", [1, 4, 7])
def test_batches_of_windows_do_not_matter(recipe: Recipe, batch_windows: int) -> None:
    """Only a runtime on a GPU makes batches; the network itself stays on the CPU here."""
    image_XYZ = torch.rand((40, 33, 21), generator=torch.Generator().manual_seed(2))
    forward = forward_of(small_network(2), CPU)
    inference = replace(recipe.inference, batch_windows=batch_windows)
    expected = window_logits(model_of(recipe, forward), image_XYZ, inference)
    calls: list[tuple[int, int]] = []
    gpu = model_of(recipe, forward, Runtime(torch.device("cuda")))
    ours = window_logits(gpu, image_XYZ, inference, lambda done, total: calls.append((done, total)))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    number = -(-18 // batch_windows)
    assert calls == [(n, number) for n in range(1, number + 1)]


def test_scores_of_two_classes_are_the_difference_of_probabilities() -> None:
    logits = torch.tensor([[-80.0, -3.0, 0.0, 0.2, 5.0, 80.0], [0.0, 1.0, 0.0, -0.3, 4.0, 0.0]]).view(2, 6, 1, 1)
    probabilities = torch.softmax(logits, dim=0)
    scores = scores_from_logits(logits[1:] - logits[:1])
    torch.testing.assert_close(scores, probabilities[1:] - probabilities[:1], rtol=0, atol=1e-6)


def test_scores_of_several_classes_are_the_softmax() -> None:
    logits = torch.randn((4, 3, 2, 5), generator=torch.Generator().manual_seed(0))
    scores = scores_from_logits(logits.clone())
    torch.testing.assert_close(scores.sum(dim=0), torch.ones(3, 2, 5))
    torch.testing.assert_close(scores[2] / scores[1], (logits[2] - logits[1]).exp())


def test_what_float16_does_not_hold_is_an_error_and_no_mask(recipe: Recipe) -> None:
    def overflowing(image_BCXYZ: Tensor) -> Tensor:
        return torch.cat([image_BCXYZ, image_BCXYZ * float("nan")], dim=1)

    image_XYZ = torch.ones(24, 24, 24)
    model = model_of(recipe, overflowing, Runtime(torch.device("cpu"), "float16"))
    with pytest.raises(ModelError, match=r"not a number in float16; choose --precision bfloat16 or float32"):
        window_logits(model, image_XYZ, recipe.inference)
