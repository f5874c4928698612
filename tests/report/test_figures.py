"""The pictures, checked by their pixels: a white box as the CT makes each plane a white rectangle on black."""

import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from ctseg.errors import OutputError
from ctseg.report.curves import draw_training_curves
from ctseg.report.overlay import draw_overlay
from ctseg.volume import Geometry, Volume

SIZE_RAS = (40, 21, 10)
SPACING_MM = (1.5, 2.0, 3.0)
SIZE_MM = (60.0, 42.0, 30.0)
WINDOW = (-57.0, 164.0)
ORANGE, BLUE = (0xE6, 0x9F, 0x00), (0x56, 0xB4, 0xE9)
HEADER_PIXELS = 125
"""Title and legend stand above this row."""


def stored_as(codes: str, array_RAS: NDArray, affine_ras: NDArray | None = None) -> Volume:
    """A RAS array in another axis order, reordered by nibabel."""
    affine = np.diag([*SPACING_MM, 1.0]) if affine_ras is None else affine_ras
    image = nib.Nifti1Image(array_RAS, affine)
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(codes))
    image = image.as_reoriented(turn)
    array = np.asarray(image.dataobj)
    return Volume(array, Geometry(array.shape, np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.affine))


def white_box() -> NDArray:
    return np.full(SIZE_RAS, 300, np.int16)


def left_posterior_superior() -> NDArray:
    mask = np.zeros(SIZE_RAS, np.uint8)
    mask[4:9, 3:6, 7:9] = 1
    return mask


def draw(path: Path, ct: NDArray, mask: NDArray, label: NDArray | None = None, codes: str = "RAS") -> NDArray:
    stored = [stored_as(codes, array) if array is not None else None for array in (ct, mask, label)]
    draw_overlay(path, stored[0], stored[1].array, stored[2] and stored[2].array, WINDOW, "case")
    return read(path)


def read(path: Path) -> NDArray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def planes(picture: NDArray) -> list[tuple[slice, slice]]:
    """The white rectangles, from left to right and top to bottom, with whatever is drawn on them."""
    boxes = ndimage.find_objects(ndimage.label(picture.max(axis=2) > 100)[0])
    large = [box for box in boxes if min(side.stop - side.start for side in box) > 50]
    return sorted(large, key=lambda box: (box[1].start, box[0].start))


def middle_of(picture: NDArray, colour: tuple[int, int, int], box: tuple[slice, slice]) -> tuple[float, float]:
    """Where a colour lies in a box: 0..1 from the left, 0..1 from the top."""
    found = np.abs(picture[box] - colour).max(axis=2) < 25
    assert found.any()
    rows, columns = np.nonzero(found)
    return columns.mean() / found.shape[1], rows.mean() / found.shape[0]


def count(picture: NDArray, colour: tuple[int, int, int]) -> int:
    return int((np.abs(picture[HEADER_PIXELS:] - colour).max(axis=2) < 25).sum())


def test_planes_are_in_radiological_convention_and_true_to_scale(tmp_path: Path) -> None:
    picture = draw(tmp_path / "a.png", white_box(), left_posterior_superior())
    axial, coronal, sagittal = planes(picture)
    x, y, z = (1 - middle / size for middle, size in zip((6.5, 4.5, 8), SIZE_RAS, strict=True))
    assert middle_of(picture, ORANGE, axial) == pytest.approx((x, y), abs=0.03), "patient's left is right, back is down"
    assert middle_of(picture, ORANGE, coronal) == pytest.approx((x, z), abs=0.03), "patient's left is right, head is up"
    assert middle_of(picture, ORANGE, sagittal) == pytest.approx((y, z), abs=0.03), "the back is right, head is up"
    pixels_per_mm = (axial[1].stop - axial[1].start) / SIZE_MM[0]
    for (rows, columns), size_mm in ((axial, (60, 42)), (coronal, (60, 30)), (sagittal, (42, 30))):
        size = np.array([columns.stop - columns.start, rows.stop - rows.start]) / pixels_per_mm
        np.testing.assert_allclose(size, size_mm, atol=2 / pixels_per_mm)


@pytest.mark.parametrize("codes", ["LPS", "LAS", "SPL", "IAR", "PIR", "ALS"])
def test_pictures_are_identical_for_any_axis_order(tmp_path: Path, codes: str) -> None:
    ct = np.random.default_rng(0).normal(50, 60, SIZE_RAS).astype(np.int16)
    mask = left_posterior_superior()
    label = np.roll(mask, 2, axis=0)
    draw(tmp_path / "ras.png", ct, mask, label)
    draw(tmp_path / "other.png", ct, mask, label, codes)
    assert (tmp_path / "ras.png").read_bytes() == (tmp_path / "other.png").read_bytes()


def test_oblique_volume_is_drawn_along_its_nearest_axes(tmp_path: Path) -> None:
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
    affine = turn @ np.diag([*SPACING_MM, 1.0])
    for codes in ("RAS", "PSL"):
        image, mask = (stored_as(codes, a, affine) for a in (white_box(), left_posterior_superior()))
        draw_overlay(tmp_path / f"{codes}.png", image, mask.array, None, WINDOW, "oblique")
    picture = read(tmp_path / "RAS.png")
    assert np.array_equal(picture, read(tmp_path / "PSL.png"))
    assert middle_of(picture, ORANGE, planes(picture)[0])[0] > 0.75


def test_label_has_its_own_colour_and_the_planes_go_through_it_wherever_the_mask_is(tmp_path: Path) -> None:
    label = left_posterior_superior()
    picture = draw(tmp_path / "a.png", white_box(), np.zeros_like(label), label)
    assert count(picture, ORANGE) == 0
    elsewhere = draw(tmp_path / "c.png", white_box(), label[::-1, ::-1, ::-1], label)
    for drawn in (picture, elsewhere):
        for box in planes(drawn):
            middle_of(drawn, BLUE, box)
    assert count(draw(tmp_path / "b.png", white_box(), label), BLUE) == 0


def test_nothing_to_show_shows_the_middle(tmp_path: Path) -> None:
    empty = np.zeros(SIZE_RAS, np.uint8)
    picture = draw(tmp_path / "a.png", white_box(), empty, empty)
    assert len(planes(picture)) == 3
    assert count(picture, ORANGE) == count(picture, BLUE) == 0
    draw(tmp_path / "air.png", np.full(SIZE_RAS, -1000, np.int16), empty)


def test_full_mask_is_outlined_at_the_border(tmp_path: Path) -> None:
    picture = draw(tmp_path / "a.png", white_box(), np.ones(SIZE_RAS, np.uint8))
    assert count(picture, ORANGE) > 1000


def test_planes_show_two_shapes_whose_centre_lies_between_them(tmp_path: Path) -> None:
    mask = np.zeros(SIZE_RAS, np.uint8)
    mask[3:9, 8:12, 4:6] = mask[31:37, 8:12, 4:6] = 1
    picture = draw(tmp_path / "a.png", white_box(), mask)
    for box in planes(picture):
        middle_of(picture, ORANGE, box)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_single_slice_is_one_plane(tmp_path: Path, axis: int) -> None:
    ct, mask = (a.take([5], axis=axis) for a in (white_box(), left_posterior_superior()))
    mask[:] = 0
    mask[tuple(slice(n // 2, n // 2 + 1) for n in mask.shape)] = 1
    picture = draw(tmp_path / "a.png", ct, mask, mask, "LPS")
    (box,) = planes(picture)
    middle_of(picture, BLUE, box)
    width_mm, height_mm = (mm for n, mm in enumerate(SIZE_MM) if n != axis)
    size = [s.stop - s.start for s in box]
    assert size[1] / size[0] == pytest.approx(width_mm / height_mm, rel=0.01)


def test_black_borders_are_left_out(tmp_path: Path) -> None:
    ct = np.full((100, 100, 60), -1000, np.int16)
    ct[20:60, 30:51, 25:35] = 300
    mask = np.zeros(ct.shape, np.uint8)
    mask[30:40, 35:40, 28:31] = 1
    axial = planes(draw(tmp_path / "a.png", ct, mask))[0]
    assert axial[1].stop - axial[1].start > 500


def epochs(count: int, every: int) -> list[dict[str, float | int | None]]:
    return [
        {"epoch": n, "loss": 1 / n, "mean_dice": 1 - 1 / n if n % every == 0 else None, "lr": 1e-4}
        for n in range(1, count + 1)
    ]


@pytest.mark.parametrize(("count", "every"), [(0, 1), (1, 1), (1, 2), (40, 5), (1260, 5)])
def test_curves_of_any_length(tmp_path: Path, count: int, every: int) -> None:
    draw_training_curves(tmp_path / "a.png", epochs(count, every), "spleen")
    picture = read(tmp_path / "a.png")
    green = (np.abs(picture - (0x00, 0x9E, 0x73)).max(axis=2) < 25).any(axis=0)
    assert green.any() == (count >= every)
    assert not green[: green.size // 2].any(), "the Dice graph stands on the right"
    assert picture[0, 0].tolist() == [255, 255, 255]


def test_best_epoch_is_marked_where_it_lies(tmp_path: Path) -> None:
    rows = epochs(10, 20)
    rows[2]["mean_dice"], rows[7]["mean_dice"] = 0.9, 0.1
    draw_training_curves(tmp_path / "a.png", rows, "spleen")
    green = np.abs(read(tmp_path / "a.png") - (0x00, 0x9E, 0x73)).max(axis=2) < 25
    dots = ndimage.binary_opening(green, np.ones((11, 11)))
    rows_of_dot, columns_of_dot = np.nonzero(dots)
    assert ndimage.label(dots)[1] == 1
    assert rows_of_dot.mean() < green.shape[0] / 2
    assert columns_of_dot.mean() < 0.75 * green.shape[1]


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        draw_training_curves(tmp_path / name, epochs(5, 2), "spleen")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert b"matplotlib" not in (tmp_path / "a").read_bytes()


def test_titles_are_not_formulas(tmp_path: Path) -> None:
    title = "cost $\\frac$ 5$"
    draw_training_curves(tmp_path / "a.png", epochs(1, 1), title)
    box = Volume(white_box(), Geometry(SIZE_RAS, np.diag([*SPACING_MM, 1.0])))
    draw_overlay(tmp_path / "b.png", box, left_posterior_superior(), None, WINDOW, title)


def test_missing_folder_is_a_users_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        draw_training_curves(tmp_path / "missing" / "a.png", epochs(1, 1), "spleen")
    assert not any(tmp_path.iterdir())


def test_matplotlib_is_imported_when_drawing_and_pyplot_never(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from ctseg.report.curves import draw_training_curves as draw\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"draw(Path({str(tmp_path / 'a.png')!r}), [], 'none')\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
