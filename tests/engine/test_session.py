"""An annotation session: masks lie where the structure is, whatever the grid; clicks are kept, undone and placed."""

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ctseg.clicks import Click
from ctseg.engine.model import Model, load_model
from ctseg.engine.runtime import Runtime
from ctseg.engine.session import (
    Session,
    keep_clicked_component,
    segment_clicks,
    voxel_of,
)
from ctseg.errors import ClickError, ModelError
from ctseg.recipe import Recipe, load_recipe
from ctseg.sources.phantom import centered_grid
from ctseg.volume import Volume

CARD = ["preprocess.spacing_mm=[4,4,4]", "preprocess.hu_window=[208,596]", "preprocess.clip=false"]
RECIPES = {name: load_recipe(f"{name}:small", CARD) for name in ("deepgrow_3d", "deepgrow_2d")}
BRIGHT_HU, DARK_HU = 800, -400


def bright(image_BCXYZ: Tensor) -> Tensor:
    """A network that finds everything bright in its window, so what a window shows is known."""
    return (image_BCXYZ[:, :1] - 0.5) * 40


def model_of(recipe: Recipe, forward: Callable[[Tensor], Tensor] = bright) -> Model:
    return Model(recipe, forward, Runtime(torch.device("cpu")), Path("made.pt"), "")


def box_ct(
    codes: str, low: tuple[int, ...], high: tuple[int, ...], spacing=(4.0, 4.0, 4.0), size=(40, 36, 30)
) -> Volume:
    """A bright box in the dark; sizes and corners are along the array's axes."""
    array = np.full(size, DARK_HU, dtype=np.int16)
    array[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = BRIGHT_HU
    return Volume(array, centered_grid(size, spacing, codes))


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAL", "PIR", "IRA"])
def test_the_mask_lies_on_the_images_own_grid(codes: str) -> None:
    volume = box_ct(codes, (12, 10, 8), (20, 19, 16))
    mask = Session(model_of(RECIPES["deepgrow_3d"]), volume).click((14, 14, 11))
    assert mask.dtype == np.uint8
    assert np.array_equal(mask, volume.array > 0)


def test_finer_oblique_and_anisotropic_grids() -> None:
    grid = centered_grid((70, 60, 25), (1.5, 1.5, 5.0), "LPS", tilt_degrees=(8.0, 3.0, -5.0))
    array = np.full(grid.size, DARK_HU, dtype=np.int16)
    array[20:50, 15:45, 6:18] = BRIGHT_HU
    mask = Session(model_of(RECIPES["deepgrow_3d"]), Volume(array, grid)).click((35, 30, 12))
    wanted = array > 0
    assert 2 * (mask & wanted).sum() / (mask.sum() + wanted.sum()) > 0.93


def test_outside_the_window_the_mask_is_empty_and_its_far_end_is_not_smeared() -> None:
    volume = box_ct("RAS", (2, 12, 12), (88, 20, 20), size=(90, 36, 36))
    mask = Session(model_of(RECIPES["deepgrow_3d"]), volume).click((45, 16, 16))
    assert np.array_equal(np.flatnonzero(mask.any(axis=(1, 2))), np.arange(29, 61))
    assert np.array_equal(mask[29:61], volume.array[29:61] > 0)


def test_a_structure_at_the_border_reaches_the_border() -> None:
    volume = box_ct("RAS", (0, 0, 0), (12, 40, 12), spacing=(3.0, 3.0, 3.0), size=(41, 40, 30))
    mask = Session(model_of(RECIPES["deepgrow_3d"]), volume).click((3, 20, 3))
    assert mask[0, 20, 0] == 1
    assert mask[5, [0, -1], 5].all(), "the whole axis, which fits the window"


def test_on_a_finer_grid_the_mask_ends_with_the_window() -> None:
    """32 voxels of 4 mm are 64 of 2 mm; half a voxel beyond the last one is still the window's."""
    volume = box_ct("RAS", (2, 12, 12), (178, 30, 30), spacing=(2.0, 2.0, 2.0), size=(180, 50, 50))
    mask = Session(model_of(RECIPES["deepgrow_3d"]), volume).click((90, 20, 20))
    assert 62 <= int(mask.any(axis=(1, 2)).sum()) <= 64


def test_voxels_beyond_the_last_one_of_the_networks_grid_are_kept() -> None:
    """43 voxels of 3 mm end half a voxel of 4 mm after the 32nd of those."""
    volume = box_ct("RAS", (25, 5, 5), (43, 30, 20), spacing=(3.0, 3.0, 3.0), size=(43, 40, 30))
    mask = Session(model_of(RECIPES["deepgrow_3d"]), volume).click((35, 15, 10))
    assert mask[42, 15, 10] == 1


def test_clicks_far_apart_widen_the_window() -> None:
    volume = box_ct("RAS", (4, 12, 12), (86, 20, 20), size=(90, 36, 36))
    session = Session(model_of(RECIPES["deepgrow_3d"]), volume)
    session.click((6, 16, 16))
    mask = session.click((83, 16, 16))
    wanted = volume.array > 0
    assert 2 * (mask & wanted).sum() / (mask.sum() + wanted.sum()) > 0.93
    assert not mask[:2].any()
    assert not mask[88:].any()


def test_a_2d_network_segments_the_slices_of_positive_clicks() -> None:
    volume = box_ct("LPS", (10, 10, 5), (30, 28, 25), spacing=(2.0, 2.0, 7.0))
    session = Session(model_of(RECIPES["deepgrow_2d"]), volume)
    mask = session.click((20, 20, 9))
    assert np.array_equal(np.flatnonzero(mask.any(axis=(0, 1))), [9])
    assert np.array_equal(session.click((20, 20, 12), positive=False), mask), "a slice without a positive click"
    both = session.click((20, 20, 24))
    assert np.array_equal(np.flatnonzero(both.any(axis=(0, 1))), [9, 24])
    wanted = volume.array[..., 9] > 0
    assert 2 * (both[..., 9] & wanted).sum() / (both[..., 9].sum() + wanted.sum()) > 0.9


def test_the_network_sees_the_clicks_where_they_are() -> None:
    seen = []

    def remember(image_BCXYZ: Tensor) -> Tensor:
        seen.append(image_BCXYZ[0].clone())
        return bright(image_BCXYZ)

    volume = box_ct("LPS", (12, 10, 8), (20, 19, 16))
    volume.array[13, 12, 9] = 3000  # one voxel to find again in the window
    session = Session(model_of(RECIPES["deepgrow_3d"], remember), volume)
    session.click((13, 12, 9))
    session.click((17, 17, 14), positive=False)
    image, positive, negative = seen[-1]
    assert int(image.argmax()) == int(positive.argmax())
    apart = np.subtract(*(np.unravel_index(int(m.argmax()), m.shape) for m in (negative, positive)))
    assert np.array_equal(apart, [-4, -5, 5]), "R A S: x and y are mirrored"


def made_model(cpu: Runtime, tmp_path: Path, name: str = "deepgrow_3d") -> Model:
    from ctseg.engine.checkpoint import save_checkpoint
    from ctseg.networks import network_for

    torch.manual_seed(0)
    content = {"recipe": RECIPES[name].to_dict(), "model": network_for(RECIPES[name]).state_dict()}
    save_checkpoint(tmp_path / "m.pt", content)
    return load_model(tmp_path / "m.pt", cpu)


@pytest.mark.parametrize("name", RECIPES)
def test_undo_reset_and_all_clicks_at_once(cpu: Runtime, tmp_path: Path, name: str) -> None:
    model, volume = made_model(cpu, tmp_path, name), box_ct("LPS", (12, 10, 8), (20, 19, 16))
    session = Session(model, volume)
    assert not session.mask.any()
    first = session.click((15, 15, 12))
    second = session.click((5, 5, 12), positive=False)
    assert session.clicks == (Click((15, 15, 12)), Click((5, 5, 12), positive=False))
    assert not np.array_equal(first, second)
    assert np.array_equal(segment_clicks(model, volume, session.clicks), second)
    assert np.array_equal(session.undo(), first)
    assert session.mask is not first, "masks given out are left alone"
    assert not session.reset().any()
    assert session.clicks == ()
    assert not session.undo().any()


def test_negative_clicks_alone_give_an_empty_mask() -> None:
    session = Session(model_of(RECIPES["deepgrow_3d"]), box_ct("RAS", (12, 10, 8), (20, 19, 16)))
    assert not session.click((14, 14, 11), positive=False).any()


def test_sessions_in_threads_share_nothing(cpu: Runtime, tmp_path: Path) -> None:
    model, volume = made_model(cpu, tmp_path), box_ct("LPS", (12, 10, 8), (20, 19, 16))
    points = [(15, 15, 12), (5, 6, 7), (30, 20, 20), (22, 11, 9)]
    alone = [Session(model, volume).click(p) for p in points]
    sessions = [Session(model, volume) for _ in points]
    masks: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(target=lambda n=n: masks.update({n: sessions[n].click(points[n])})) for n in range(len(points))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(masks[n], alone[n]) for n in range(len(points)))


@pytest.mark.parametrize("point", [(40, 0, 0), (0, -1, 0), (0, 0, 30.5)])
def test_a_click_outside_names_the_size(point: tuple[float, ...]) -> None:
    session = Session(model_of(RECIPES["deepgrow_3d"]), box_ct("RAS", (12, 10, 8), (20, 19, 16)))
    with pytest.raises(ClickError, match="outside the image, which has 40 x 36 x 30 voxels counted from 0"):
        session.click(point)
    assert session.clicks == ()


@pytest.mark.parametrize("point", [(1, 2), (1, 2, float("nan")), (1, 2, float("inf"))])
def test_a_click_is_three_numbers(point: tuple[float, ...]) -> None:
    with pytest.raises(ClickError, match="expected three numbers"):
        voxel_of(point, centered_grid((9, 9, 9), (1.0, 1.0, 1.0), "RAS"))


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAL"])
def test_patient_coordinates(codes: str) -> None:
    grid = centered_grid((30, 28, 26), (0.7, 1.5, 3.0), codes, tilt_degrees=(5.0, -4.0, 3.0))
    lps = (grid.affine @ [11.2, 7.9, 20.4, 1.0])[:3]
    assert voxel_of(lps, grid, "lps") == (11, 8, 20)
    assert voxel_of((-lps[0], -lps[1], lps[2]), grid, "ras") == (11, 8, 20)
    with pytest.raises(ClickError, match="ras mm, voxel"):
        voxel_of((1000.0, 0.0, 0.0), grid, "ras")


def test_the_largest_part_with_a_positive_click_is_kept() -> None:
    mask = np.zeros((20, 10, 10), np.uint8, order="F")
    mask[0:2, 0:2, 0:2], mask[5:9, 5:9, 5:9], mask[12:20] = 1, 1, 1
    kept = keep_clicked_component(mask, [Click((1, 1, 1)), Click((6, 6, 6)), Click((15, 5, 5), positive=False)])
    assert (kept.sum(), kept[6, 6, 6]) == (64, 1)
    assert keep_clicked_component(mask, [Click((3, 3, 3))]).sum() == 800, "none is clicked: the largest of all"
    assert not keep_clicked_component(np.zeros_like(mask), [Click((1, 1, 1))]).any()


def test_a_model_without_clicks_is_refused(tiny_recipe: Recipe) -> None:
    model = model_of(dataclasses.replace(tiny_recipe))
    with pytest.raises(ModelError, match="segments without clicks; use `ctseg infer`"):
        Session(model, box_ct("RAS", (12, 10, 8), (20, 19, 16)))
