"""Made series against the formula of their voxels: order, gaps, duplicates, tilt, rescale, types, bad tags."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from numpy.typing import NDArray
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from ctseg.errors import CtsegError, ImageError
from ctseg.io.dicom.read import DicomCT, find_series, read_extent, read_series, select_series
from ctseg.volume import Geometry
from dicom_maker import Plan, write_series

Maker = Callable[..., Path]


def read(path: Path, **policies: str) -> DicomCT:
    return read_series(select_series(find_series([path]), None), **policies)


def refusal(path: Path, **policies: str) -> str:
    with pytest.raises(ImageError) as caught:
        read(path, **policies)
    assert "Traceback" not in str(caught.value)
    assert "secret" not in str(caught.value)
    return str(caught.value)


def points_of(grid: Geometry) -> NDArray[np.float64]:
    """`[x, y, z, 3]` places of the voxels."""
    indices = np.stack(np.meshgrid(*(np.arange(n) for n in grid.size), indexing="ij"), axis=-1)
    return indices @ grid.affine[:3, :3].T + grid.affine[:3, 3]


def assert_right_everywhere(ct: DicomCT, plan, tolerance: float = 0.5) -> None:
    """Every voxel holds the formula's value at the place where the grid says it lies."""
    expected = plan.hu(points_of(ct.volume.geometry))
    assert np.abs(ct.volume.array - expected).max() <= tolerance + 1e-3


@pytest.mark.parametrize("axes", ["axial", "coronal", "sagittal", "upside-down", "oblique"])
@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled", "absent"])
def test_voxels_lie_where_the_formula_says_whatever_the_file_order(series_plan, make_series: Maker, axes, order):
    shuffled = [4, 0, 5, 2, 1, 3]
    number = {
        "ascending": lambda n: n + 1,
        "descending": lambda n: 60 - n,
        "shuffled": lambda n: shuffled[n],
        "absent": lambda n: None,
    }
    plan = series_plan(axes=axes, instance_numbers=number[order])
    ct = read(make_series(plan))
    assert ct.volume.array.shape == ct.volume.geometry.size == plan.size
    assert ct.volume.array.dtype == np.int16
    assert ct.volume.array.flags.f_contiguous
    np.testing.assert_allclose(ct.volume.geometry.spacing_mm, plan.spacing_mm, atol=1e-6)
    np.testing.assert_allclose(ct.volume.geometry.origin_mm, plan.origin_mm, atol=1e-6)
    np.testing.assert_allclose(ct.volume.geometry.direction, plan.directions, atol=1e-6)
    assert_right_everywhere(ct, plan)
    assert not ct.series.problems
    assert [one.value("InstanceNumber") for one in ct.slices] == [number[order](n) for n in range(6)]


@pytest.mark.parametrize("axes", ["axial", "coronal", "sagittal", "upside-down"])
def test_simpleitk_reads_the_same(series_plan, make_series: Maker, axes: str):
    folder = make_series(series_plan(axes=axes))
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    image, ct = reader.Execute(), read(folder)
    np.testing.assert_array_equal(SimpleITK.GetArrayViewFromImage(image).T, ct.volume.array)
    np.testing.assert_allclose(image.GetOrigin(), ct.volume.geometry.origin_mm, atol=1e-5)
    np.testing.assert_allclose(image.GetSpacing(), ct.volume.geometry.spacing_mm, atol=1e-5)
    np.testing.assert_allclose(np.reshape(image.GetDirection(), (3, 3)), ct.volume.geometry.direction, atol=1e-5)


@pytest.mark.parametrize(
    "syntax",
    [
        ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless, JPEG2000Lossless,
        JPEGLSLossless,
    ],
)  # fmt: skip
def test_transfer_syntaxes_give_equal_voxels(series_plan, make_series: Maker, syntax: str):
    change = swap_bytes if syntax == ExplicitVRBigEndian else (lambda dataset, n: None)
    plan = series_plan(syntax=syntax, size=(64, 48, 3), change=change)
    assert_right_everywhere(read(make_series(plan)), plan)


def swap_bytes(dataset, n: int) -> None:
    dataset.PixelData = np.frombuffer(dataset.PixelData, np.int16).byteswap().tobytes()


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.1", RLELossless, JPEG2000Lossless])
def test_an_enhanced_multi_frame_file_reads_like_the_series(series_plan, make_enhanced: Maker, syntax: str):
    plan = series_plan(size=(64, 48, 6), axes="oblique", rescale=lambda n: (1, -1000 - n), syntax=syntax)
    ct = read(make_enhanced(plan))
    assert_right_everywhere(ct, plan)
    assert [one.frame for one in ct.slices] == [3, 0, 4, 1, 5, 2]
    assert {one.source.path.name for one in ct.slices} == {"enhanced.dcm"}


class TestMixed:
    def test_a_stray_slice_of_another_orientation_is_a_series_of_its_own(self, series_plan, make_series: Maker):
        """One slice that lies across the others, under the same UID: never stacked, never dropped in silence."""
        uid = {"SeriesInstanceUID": "1.2.3.4.5.6"}
        make_series(series_plan(tags=uid))
        folder = make_series(series_plan(tags=uid, axes="coronal", size=(9, 7, 1)), prefix="stray")
        found = find_series([folder])
        assert [len(one) for one in found.series] == [6, 1]
        assert [note.code for note in found.series[0].notes] == ["shared-uid"]
        with pytest.raises(CtsegError, match="there are 2 CT series"):
            select_series(found, None)
        assert_right_everywhere(read_series(select_series(found, "most-slices")), series_plan())

    @pytest.mark.parametrize("other", [{"size": (9, 8, 6)}, {"spacing_mm": (0.75, 1.3, 2.5)}])
    def test_slices_of_another_size_or_spacing_too(self, series_plan, make_series: Maker, other: dict):
        uid = {"SeriesInstanceUID": "1.2.3.4.5.6"}
        make_series(series_plan(tags=uid))
        found = find_series([make_series(series_plan(tags=uid, **other), prefix="other")])
        assert [len(one) for one in found.series] == [6, 6]

    @pytest.mark.parametrize(
        ("tags", "kind"),
        [
            ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer"),
            ({"ImageType": ["DERIVED", "SECONDARY", "SCOUT"]}, "localizer"),
            ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "secondary capture"),
            ({"Modality": "MR"}, "MR"),
            ({"SamplesPerPixel": 3}, "colour image"),
        ],
    )
    def test_what_is_no_ct_is_left_out_and_told(self, series_plan, make_series: Maker, tags: dict, kind: str):
        make_series(series_plan(), "all/ct")
        folder = make_series(series_plan(tags=tags), "all/other").parent
        found = find_series([folder])
        assert [one.kind for one in found.series] == ["CT", kind]
        assert_right_everywhere(read_series(select_series(found, None)), series_plan())
        with pytest.raises(ImageError, match=f"it is no CT but {kind}; choose a CT series"):
            read_series(select_series(found, "#2"))


class TestRescale:
    def test_each_slice_has_its_own(self, series_plan, make_series: Maker):
        plan = series_plan(rescale=lambda n: (1 + n % 2, -1024 + 8 * n), hu=lambda p: 2 * np.rint(p @ [1, 2, 8]))
        ct = read(make_series(plan))
        assert ct.volume.array.dtype == np.int16
        assert_right_everywhere(ct, plan)
        assert [note.code for note in ct.report.notes] == ["rescale"]

    def test_a_fraction_gives_float32(self, series_plan, make_series: Maker):
        plan = series_plan(rescale=lambda n: (0.25, -1024.5))
        ct = read(make_series(plan))
        assert ct.volume.array.dtype == np.float32
        assert_right_everywhere(ct, plan, tolerance=0.125)

    def test_large_values_give_int32(self, series_plan, make_series: Maker):
        plan = series_plan(rescale=lambda n: (32, -1024), hu=lambda p: 40000 + 32 * np.rint(p[..., 0]))
        ct = read(make_series(plan))
        assert ct.volume.array.dtype == np.int32
        assert_right_everywhere(ct, plan, tolerance=16)

    @pytest.mark.parametrize(
        ("bits", "signed"), [((8, 8), False), ((16, 12), False), ((16, 12), True), ((32, 32), True)]
    )
    def test_stored_types(self, series_plan, make_series: Maker, bits: tuple[int, int], signed: bool):
        plan = series_plan(bits=bits, signed=signed, rescale=lambda n: (8, -1000), hu=lambda p: -1000 + 8 * np.rint(
            50 + p[..., 0] + (p[..., 2] - 101.25) / 2.5))  # fmt: skip
        ct = read(make_series(plan))
        assert ct.volume.array.dtype == np.int16
        assert_right_everywhere(ct, plan, tolerance=0)

    @pytest.mark.parametrize("signed", [False, True])
    def test_bits_above_the_stored_ones_do_not_count(self, series_plan, make_series: Maker, signed: bool):
        def overlay(dataset, n: int) -> None:
            stored = np.frombuffer(dataset.PixelData, np.uint16) & 0x0FFF
            dataset.PixelData = (stored | 0x5000).astype(np.uint16).tobytes()

        plan = series_plan(bits=(16, 12), signed=signed, rescale=lambda n: (1, 0 if signed else -1024), change=overlay)
        assert_right_everywhere(read(make_series(plan)), plan)

    def test_padding_keeps_its_value_and_is_counted(self, series_plan, make_series: Maker):
        def pad(dataset, n: int) -> None:
            stored = np.frombuffer(dataset.PixelData, np.int16).copy()
            stored[:5] = -2000
            dataset.PixelData = stored.tobytes()
            dataset.add_new("PixelPaddingValue", "US", 2**16 - 2000)  # as an unsigned number, though the pixels are not

        ct = read(make_series(series_plan(change=pad)))
        assert ct.report.padding_voxels == 5 * 6
        assert ct.report.hu_range[0] == -3024 == ct.volume.array.min()

    def test_a_range_of_padding(self, series_plan, make_series: Maker):
        def pad(dataset, n: int) -> None:
            stored = np.frombuffer(dataset.PixelData, np.int16).copy()
            stored[:5] = np.arange(-2000, -1995)
            dataset.PixelData = stored.tobytes()
            dataset.add_new("PixelPaddingValue", "SS", -2000)
            dataset.add_new("PixelPaddingRangeLimit", "SS", -1997)

        assert read(make_series(series_plan(change=pad))).report.padding_voxels == 4 * 6


class TestGaps:
    def test_a_missing_slice_is_an_error_that_names_its_position(self, series_plan, make_series: Maker):
        message = refusal(make_series(series_plan(missing=[2])))
        assert "missing slices of 2.50 mm: 1 (1 between 103.8 and 108.8 mm); find them, or --gaps fill" in message
        assert "\n" not in message

    def test_fill_interpolates_and_reports(self, series_plan, make_series: Maker):
        plan = series_plan(missing=[2, 4, 5], size=(9, 7, 8))
        ct = read(make_series(plan), gaps="fill")
        assert ct.volume.geometry.size == plan.size
        assert_right_everywhere(ct, plan, tolerance=1)
        assert ct.report.filled_slices == (2, 4, 5)
        assert [z for z, one in enumerate(ct.slices) if one is None] == [2, 4, 5]
        assert [problem.code for problem in ct.report.repaired] == ["gaps"]
        assert ct.report.increments_mm == pytest.approx((2.5, 2.5, 7.5))

    def test_labels_go_back_to_the_slices_there_are(self, series_plan, make_series: Maker):
        ct = read(make_series(series_plan(missing=[2])), gaps="fill")
        labels = np.arange(6, dtype=np.uint8) * np.ones((9, 7, 1), np.uint8)
        back = ct.on_source_slices(labels)
        assert [int(plane.max()) for _, plane in back] == [0, 1, 3, 4, 5]
        assert [float(one.position_mm[2]) for one, _ in back] == [101.25, 103.75, 108.75, 111.25, 113.75]
        with pytest.raises(ValueError, match="labels must be of size"):
            ct.on_source_slices(labels[1:])

    def test_ignore_closes_up_and_says_by_how_much(self, series_plan, make_series: Maker):
        plan = series_plan(missing=[2])
        ct = read(make_series(plan), gaps="ignore")
        assert ct.volume.geometry.size == (9, 7, 5)
        assert ct.volume.geometry.spacing_mm[2] == pytest.approx(2.5)
        assert ct.report.closed_up_mm == pytest.approx(2.5)
        np.testing.assert_array_equal(ct.volume.array[:, :, 2], np.rint(plan.plane(3)))

    def test_of_three_slices_one_gap_is_found(self, series_plan, make_series: Maker):
        assert "missing slices of 2.50 mm: 1 " in refusal(make_series(series_plan(size=(4, 4, 4), missing=[1])))

    @pytest.mark.parametrize("policy", ["fill", "ignore"])
    def test_an_uneven_step_is_never_mended(self, series_plan, make_series: Maker, policy: str):
        def move(dataset, n: int) -> None:
            if n == 3:
                dataset.ImagePositionPatient = [*dataset.ImagePositionPatient[:2], 101.25 + 3 * 2.5 + 0.9]

        message = refusal(make_series(series_plan(change=move)), gaps=policy)
        assert "distances between slices vary: 3 x 2.50, 1 x 3.40, 1 x 1.60 mm" in message

    def test_small_steps_that_add_up_are_not_even(self, series_plan, make_series: Maker):
        def stretch(dataset, n: int) -> None:
            dataset.ImagePositionPatient = [0, 0, n * 2.5 + max(0, n - 20) * 0.03]

        message = refusal(make_series(series_plan(size=(4, 4, 40), change=stretch)))
        assert "even steps would be off by up to 0.29 mm" in message

    def test_rounded_positions_are_even(self, series_plan, make_series: Maker):
        def rounded(dataset, n: int) -> None:
            dataset.ImagePositionPatient = [0, 0, round(n * 0.625, 2)]

        ct = read(make_series(series_plan(size=(4, 4, 41), change=rounded)))
        assert ct.volume.geometry.spacing_mm[2] == pytest.approx(0.625)


class TestDuplicates:
    def test_equal_ones_are_dropped_and_counted(self, series_plan, make_series: Maker, tmp_path: Path):
        folder = make_series(series_plan())
        for name in ("slice001.dcm", "slice004.dcm"):
            (folder / f"copy of {name}").write_bytes((folder / name).read_bytes())
        ct = read(folder)
        assert ct.report.dropped_duplicates == 2
        assert ct.volume.geometry.size == (9, 7, 6)
        assert_right_everywhere(ct, series_plan())

    def test_different_ones_are_an_error_that_names_the_place(self, series_plan, make_series: Maker):
        uid = {"SeriesInstanceUID": "1.2.3.4.5.6", "FrameOfReferenceUID": "1.2.3.4.5.7"}
        make_series(series_plan(tags=uid))
        folder = make_series(series_plan(tags=uid, missing=[0, 1, 2, 4, 5], hu=lambda p: p[..., 0]), prefix="other")
        assert "1 position(s) hold several different images, the first at 108.8 mm" in refusal(folder)

    @pytest.mark.parametrize("keyword", ["AcquisitionNumber", "TemporalPositionIdentifier", "AcquisitionTime"])
    def test_two_acquisitions_in_one_series_are_two(self, series_plan, make_series: Maker, keyword: str):
        values = ("101112", "101500") if keyword == "AcquisitionTime" else (1, 2)
        plans = [
            series_plan(tags={"SeriesInstanceUID": "1.2.3.4.5.6", keyword: value}, hu=lambda p, k=k: p[..., 0] + k)
            for k, value in enumerate(values)
        ]
        for n, plan in enumerate(plans):
            folder = make_series(plan, prefix=f"phase{n}")
        found = find_series([folder])
        assert [(len(one), one.problems, [note.code for note in one.notes]) for one in found.series] == [
            (6, (), ["shared-uid"]), (6, (), ["shared-uid"]),
        ]  # fmt: skip
        for one, plan in zip(found.series, plans, strict=True):
            assert_right_everywhere(read_series(one), plan)
        with pytest.raises(CtsegError, match="there are 2 CT series"):
            select_series(found, None)

    @pytest.mark.parametrize("keyword", ["AcquisitionNumber", "TemporalPositionIdentifier"])
    def test_two_acquisitions_half_a_slice_apart_are_two(self, series_plan, make_series: Maker, keyword: str):
        """Together they look like one even stack of twice as many slices."""
        uid = {"SeriesInstanceUID": "1.2.3.4.5.6", "FrameOfReferenceUID": "1.2.3.4.5.7"}
        first = series_plan(tags={**uid, keyword: 1})
        second = series_plan(tags={**uid, keyword: 2}, origin_mm=(-20.0, 15.5, 102.5), hu=lambda p: p[..., 0])
        make_series(first, prefix="first")
        found = find_series([make_series(second, prefix="second")])
        assert [len(one) for one in found.series] == [6, 6]
        for one, plan in zip(found.series, (first, second), strict=True):
            assert_right_everywhere(read_series(one), plan)

    def test_an_acquisition_number_that_changes_along_the_stack_splits_nothing(self, series_plan, make_series: Maker):
        plan = series_plan(change=lambda dataset, n: setattr(dataset, "AcquisitionNumber", 1 + n // 3))
        assert_right_everywhere(read(make_series(plan)), plan)

    def test_all_at_one_position(self, series_plan, make_series: Maker):
        plan = series_plan(change=lambda dataset, n: setattr(dataset, "ImagePositionPatient", [0, 0, 0]))
        assert "all slices lie at one position" in refusal(make_series(plan))


class TestTilt:
    @pytest.mark.parametrize("degrees", [12.0, -16.5])
    def test_it_is_an_error_that_names_the_angle(self, series_plan, make_series: Maker, degrees: float):
        message = refusal(make_series(series_plan(tilt_degrees=degrees)))
        assert f"(gantry tilt {abs(degrees):.1f} degrees); --tilt shear" in message

    @pytest.mark.parametrize("degrees", [12.0, -16.5])
    @pytest.mark.parametrize("axes", ["axial", "oblique"])
    def test_shear_puts_every_voxel_where_the_formula_says(self, series_plan, make_series: Maker, degrees, axes):
        plan = series_plan(tilt_degrees=degrees, axes=axes)
        ct = read(make_series(plan), tilt="shear")
        grid = ct.volume.geometry
        np.testing.assert_allclose(grid.direction, plan.directions, atol=1e-6)
        drift = np.tan(np.radians(abs(degrees))) * 5 * 2.5 / 1.25
        assert grid.size == (9, 7 + int(np.ceil(drift)), 6)
        inside = ct.volume.array != -1024
        expected = plan.hu(points_of(grid))
        for z in range(6):
            off = np.tan(np.radians(degrees)) * z * 2.5 / 1.25 + (np.ceil(drift) if degrees < 0 else 0)
            rows = slice(int(np.ceil(off - 1e-3)), int(np.floor(off + 6 + 1e-3)) + 1)
            assert inside[:, rows, z].all()
            assert np.abs(ct.volume.array[:, rows, z] - expected[:, rows, z]).max() <= 1.01
        assert ct.report.sheared
        assert ct.report.tilt_degrees == pytest.approx(abs(degrees), abs=1e-3)

    @pytest.mark.parametrize("degrees", [12.0, -16.5])
    def test_labels_on_the_sheared_grid_come_back_to_the_source_pixels(self, series_plan, make_series: Maker, degrees):
        """A cylinder along the patient's z axis: each source pixel well inside or outside gets its own label back."""
        plan = series_plan(tilt_degrees=degrees, size=(40, 40, 12), spacing_mm=(1.0, 1.0, 2.0), origin_mm=(0, 0, 0))
        ct = read(make_series(plan), tilt="shear")

        def radius_mm(points: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.hypot(points[..., 0] - 20, points[..., 1] - 20)

        labels = (radius_mm(points_of(ct.volume.geometry)) < 9).astype(np.uint8)
        back = ct.on_source_slices(labels)
        assert len(back) == 12
        i, j = np.meshgrid(np.arange(40), np.arange(40), indexing="ij")
        for one, plane in back:
            places = one.position_mm + i[..., None] * one.axes[0] + j[..., None] * one.axes[1]
            distance = radius_mm(places)
            assert plane.shape == (40, 40)
            assert plane[distance < 8.2].all()
            assert not plane[distance > 9.8].any()

    def test_tilt_and_gaps_together(self, series_plan, make_series: Maker):
        folder = make_series(series_plan(tilt_degrees=10, missing=[3], size=(9, 30, 6)))
        message = refusal(folder)
        assert "--gaps fill" in message
        assert "--tilt shear" in message
        assert "--gaps" in refusal(folder, tilt="shear")
        ct = read(folder, tilt="shear", gaps="fill")
        expected = series_plan().hu(points_of(ct.volume.geometry))
        middle = np.s_[:, 8:28, :]
        assert np.abs(ct.volume.array[middle] - expected[middle]).max() <= 1.01
        assert len(ct.on_source_slices(np.zeros(ct.volume.geometry.size, np.uint8))) == 5

    def test_a_hundredth_of_a_degree_is_none(self, series_plan, make_series: Maker):
        plan = series_plan(tilt_degrees=0.01)
        assert_right_everywhere(read(make_series(plan)), plan)


class TestHeaders:
    @pytest.mark.parametrize(
        ("keyword", "fragment"),
        [
            ("ImagePositionPatient", "ImagePositionPatient is missing in 6 of 6 slices"),
            ("ImageOrientationPatient", "ImageOrientationPatient is missing or not at right angles in 6 of 6 slices"),
            ("PixelSpacing", "PixelSpacing is missing or not positive"),
            ("RescaleIntercept", "Hounsfield units are unknown"),
            ("RescaleSlope", "Hounsfield units are unknown"),
            ("BitsAllocated", "BitsAllocated must be one of 8, 16, 32, got None"),
        ],
    )
    def test_what_is_missing_is_told_in_one_line(self, series_plan, make_series: Maker, keyword: str, fragment: str):
        message = refusal(make_series(series_plan(drop=[keyword])))
        assert fragment in message
        assert "\n" not in message

    @pytest.mark.parametrize(
        "keyword",
        ["SeriesInstanceUID", "SOPClassUID", "InstanceNumber", "SliceThickness", "FrameOfReferenceUID",
         "StudyInstanceUID", "PatientID", "AcquisitionNumber", "HighBit", "RescaleType", "ImageType", "SeriesNumber",
         "Manufacturer"],
    )  # fmt: skip
    def test_what_is_not_needed_may_be_missing(self, series_plan, make_series: Maker, keyword: str):
        plan = series_plan(tags={keyword: ""}) if keyword == "SOPClassUID" else series_plan(drop=[keyword])
        assert_right_everywhere(read(make_series(plan)), plan)

    def test_imager_pixel_spacing_is_no_substitute(self, series_plan, make_series: Maker):
        plan = series_plan(drop=["PixelSpacing"], tags={"ImagerPixelSpacing": [1.25, 0.75]})
        assert "PixelSpacing is missing or not positive (ImagerPixelSpacing is" in refusal(make_series(plan))

    def test_lies_about_the_distance_are_noted_and_do_not_count(self, series_plan, make_series: Maker):
        plan = series_plan(tags={"SliceThickness": 5, "SpacingBetweenSlices": 1})
        ct = read(make_series(plan))
        assert ct.volume.geometry.spacing_mm[2] == pytest.approx(2.5)
        assert [note.code for note in ct.report.notes] == ["thickness", "spacing-between-slices"]

    @pytest.mark.parametrize(
        ("tags", "fragment"),
        [
            ({"ImageOrientationPatient": [1, 0, 0, 0.5, 1, 0]}, "not at right angles"),
            ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "not at right angles"),
            ({"PixelSpacing": [0, 1]}, "PixelSpacing is missing or not positive"),
            ({"RescaleSlope": 0}, "Hounsfield units are unknown"),
            ({"RescaleType": "OD"}, "its values are OD by RescaleType, not HU"),
            ({"BitsStored": 20}, "BitsStored 20 and HighBit 15 do not fit 16 bits"),
            ({"BitsAllocated": 1}, "BitsAllocated must be one of 8, 16, 32, got 1"),
            ({"Rows": 14}, "truncated: 126 bytes of pixels, its header promises 252"),
            ({"Rows": 65535, "Columns": 65535}, "at most 2147483648 voxels, its headers promise 2.58e+10"),
            ({"PhotometricInterpretation": "RGB"}, "PhotometricInterpretation must be one of"),
            ({"ImagePositionPatient": [1, 2, 1e9]}, "ImagePositionPatient is missing in 6 of 6 slices"),
        ],
    )
    def test_what_is_wrong_is_told_in_one_line(self, series_plan, make_series: Maker, tags, fragment: str):
        message = refusal(make_series(series_plan(tags=tags)))
        assert fragment in message

    def test_frames_of_reference_must_agree(self, series_plan, make_series: Maker):
        def differ(dataset, n: int) -> None:
            dataset.FrameOfReferenceUID = f"1.2.3.4.{n // 3}"

        assert "2 frames of reference in one stack" in refusal(make_series(series_plan(change=differ)))

    def test_cosines_that_are_nearly_right_are_made_exact(self, series_plan, make_series: Maker):
        plan = series_plan(tags={"ImageOrientationPatient": [1.0002, 0, 0, 0.0003, 1, 0]})
        direction = read(make_series(plan)).volume.geometry.direction
        np.testing.assert_allclose(direction.T @ direction, np.eye(3), atol=1e-12)

    def test_a_single_slice_is_no_volume(self, series_plan, make_series: Maker):
        folder = make_series(series_plan())
        assert "a single slice is no volume; name the folder" in refusal(folder / "slice003.dcm")

    def test_a_constant_volume_is_no_ct(self, series_plan, make_series: Maker):
        assert "every voxel is 7: not a CT" in refusal(make_series(series_plan(hu=lambda p: 0 * p[..., 0] + 7)))

    def test_all_problems_are_told_at_once(self, series_plan, make_series: Maker):
        message = refusal(make_series(series_plan(drop=["RescaleSlope"], missing=[2], tilt_degrees=10)))
        assert ": 3 problems\n" in message

    def test_a_broken_multi_frame_file(self, make_enhanced: Maker):
        import pydicom

        path = make_enhanced()
        dataset = pydicom.dcmread(path)
        dataset.NumberOfFrames = 7
        dataset.save_as(path)
        found = find_series([path])
        assert not found.series
        assert found.rejected[0][1].startswith("it promises 7 frames and describes 6")


def test_the_report_is_data_without_identifiers(series_plan, make_series: Maker):
    import json

    ct = read(make_series(series_plan(missing=[2], tilt_degrees=8)), gaps="fill", tilt="shear")
    text = json.dumps(ct.report.to_dict(), allow_nan=False)
    for secret in ("Muster", "secret", "1950", "ACC", ct.series.uid, str(ct.series.value("StudyInstanceUID"))):
        assert secret not in text
    for known in ("Maker", "Model T", "B30f", "axial", "120.0"):
        assert known in text


@pytest.mark.parametrize("policy", [{}, {"gaps": "fill"}, {"gaps": "ignore"}, {"tilt": "shear"}], ids=str)
@pytest.mark.parametrize("slope", [1, 0.5])
def test_the_headers_tell_what_a_series_takes(tmp_path: Path, policy: dict[str, Any], slope: float) -> None:
    missing = (2,) if "gaps" in policy else ()
    tilt_degrees = 20.0 if "tilt" in policy else 0.0
    plan = Plan(missing=missing, tilt_degrees=tilt_degrees, rescale=lambda n: (slope, -1024))
    series = select_series(find_series([write_series(tmp_path / "ct", plan)]), None)
    volume = read_series(series, **policy).volume
    extent = read_extent(series, **policy)
    assert extent.geometry.agrees_with(volume.geometry)
    assert extent.held_bytes == volume.array.nbytes
    assert (extent.reading_bytes > 0, extent.movable) == ((True, False) if tilt_degrees else (False, True))
    on_disk = read_series(series, **policy, scratch=tmp_path).volume
    np.testing.assert_array_equal(on_disk.array, volume.array)
    assert [path.name for path in tmp_path.iterdir()] == ["ct"]
