"""RTSTRUCT out and in: another filler finds the mask in the contours; real structure sets match published masks."""

import shutil
import subprocess
import zipfile
from collections.abc import Callable
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from matplotlib.path import Path as Polygon
from numpy.typing import NDArray

from ctseg.codes import ANATOMY, Algorithm, Code, Structure, uncoded
from ctseg.errors import CtsegError, ImageError, OutputError
from ctseg.io.dicom import rtstruct as module
from ctseg.io.dicom.files import Source
from ctseg.io.dicom.headers import read_dataset
from ctseg.io.dicom.labels import DicomLabels, read_labels, regions_of
from ctseg.io.dicom.read import DicomCT, find_series, read_series, select_series
from ctseg.io.dicom.regions import Region, check_found, choose_regions, parse_choice
from ctseg.io.dicom.rtstruct import write_rtstruct
from ctseg.io.dicom.silence import pydicom_silent
from ctseg.io.images import read_labels as read_image_labels

Maker = Callable[..., Path]
SPLEEN = Structure(value=1, name="spleen", category=ANATOMY, type=Code(value="78961009", meaning="Spleen"))
THING = uncoded(2, "thing")
ALGORITHM = Algorithm(name="spleen", version="1.2.3", model="0123456789abcdef")
DIRECTIONS = [
    (tuple(np.array(row) * a), tuple(np.array(column) * b))
    for row, column in permutations(((1, 0, 0), (0, 1, 0), (0, 0, 1)), 2)
    for a, b in product((1, -1), repeat=2)
]
BOTH = [parse_choice("1=spleen"), parse_choice("2=#2")]


def read_ct(path: Path, **policies: str) -> DicomCT:
    return read_series(select_series(find_series([path]), None), **policies)


def random_labels(ct: DicomCT) -> NDArray[np.uint8]:
    return np.random.default_rng(0).choice(np.array([0, 1, 1, 2], np.uint8), ct.volume.geometry.size)


def write(path: Path, ct: DicomCT, labels: NDArray[np.uint8]) -> tuple[str, ...]:
    return write_rtstruct(path, ct, labels, [SPLEEN, THING], ALGORITHM)


def filled_elsewhere(path: Path, affine: NDArray[np.float64], size: tuple[int, int, int]) -> NDArray[np.uint8]:
    """The ROIs at the voxels of a grid: matplotlib says which centres lie within, by windings, in millimetres."""
    labels = np.zeros(size, np.uint8)
    to_voxels = np.linalg.inv(affine)
    centres = np.stack(np.meshgrid(np.arange(size[0]), np.arange(size[1]), indexing="ij"), axis=-1).reshape(-1, 2)
    for roi in pydicom.dcmread(path).ROIContourSequence:
        for contour in roi.get("ContourSequence", []):
            points = np.array(contour.ContourData, float).reshape(-1, 3)
            voxels = points @ to_voxels[:3, :3].T + to_voxels[:3, 3]
            z = int(np.rint(voxels[0, 2]))
            assert np.abs(voxels[:, 2] - z).max() < 1e-3, "in the plane of one image"
            within = Polygon(np.vstack([voxels[:, :2], voxels[:1, :2]]), closed=True).contains_points(centres)
            labels[:, :, z][within.reshape(size[:2])] = roi.ReferencedROINumber
    return labels


@pytest.mark.parametrize("order", ["ascending", "descending"])
@pytest.mark.parametrize("axes", DIRECTIONS, ids=lambda axes: " ".join(str(int(v)) for v in np.ravel(axes)))
def test_another_filler_finds_the_mask_where_it_is(series_plan, make_series, tmp_path: Path, axes, order) -> None:
    numbers = {"ascending": lambda n: n + 1, "descending": lambda n: 60 - n}
    ct = read_ct(make_series(series_plan(axes=axes, size=(8, 7, 4), instance_numbers=numbers[order])))
    labels = random_labels(ct)
    write(tmp_path / "rt.dcm", ct, labels)
    found = filled_elsewhere(tmp_path / "rt.dcm", ct.volume.geometry.affine, labels.shape)
    np.testing.assert_array_equal(found, labels)


def test_holes_and_islands_through_the_file(series_plan, make_series: Maker, tmp_path: Path) -> None:
    ct = read_ct(make_series(series_plan(axes="oblique", size=(40, 40, 3))))
    labels = np.zeros((40, 40, 3), np.uint8)
    labels[4:36, 4:36, 1] = 1
    labels[10:30, 10:30, 1] = 0
    labels[15:20, 14:22, 1] = 1
    write(tmp_path / "rt.dcm", ct, labels)
    dataset = pydicom.dcmread(tmp_path / "rt.dcm")
    assert len(dataset.ROIContourSequence[0].ContourSequence) == 2, "the ring with its keyhole, and the island"
    np.testing.assert_array_equal(
        filled_elsewhere(tmp_path / "rt.dcm", ct.volume.geometry.affine, labels.shape), labels
    )
    np.testing.assert_array_equal(read_labels([dataset], ct, BOTH[:1]).labels.array, labels)


def test_what_a_structure_set_says(series_plan, make_series: Maker, tmp_path: Path) -> None:
    folder = make_series(series_plan(axes="coronal"))
    ct = read_ct(folder)
    labels = random_labels(ct)
    assert write(tmp_path / "rt.dcm", ct, labels) == ()
    sources = {d.SOPInstanceUID: d for d in map(pydicom.dcmread, folder.iterdir())}
    first = next(iter(sources.values()))
    dataset = pydicom.dcmread(tmp_path / "rt.dcm")
    assert regions_of(dataset) == (
        Region(number=1, name="spleen", codes=("SCT:78961009",), kind="ROI"),
        Region(number=2, name="thing", kind="ROI"),
    )
    assert [o.RTROIInterpretedType for o in dataset.RTROIObservationsSequence] == ["ORGAN", ""]
    frame = dataset.ReferencedFrameOfReferenceSequence[0]
    assert frame.FrameOfReferenceUID == first.FrameOfReferenceUID
    series = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence[0]
    assert series.SeriesInstanceUID == first.SeriesInstanceUID
    assert {r.ReferencedSOPInstanceUID for r in series.ContourImageSequence} == set(sources)
    for roi in dataset.ROIContourSequence:
        for contour in roi.ContourSequence:
            source = sources[contour.ContourImageSequence[0].ReferencedSOPInstanceUID]
            offset = np.array(contour.ContourData[:3], float) - np.array(source.ImagePositionPatient, float)
            normal = np.cross(*np.array(source.ImageOrientationPatient, float).reshape(2, 3))
            assert abs(offset @ normal) < 1e-3, "the image that it lies on"
            assert len(contour.ContourData) == 3 * contour.NumberOfContourPoints >= 9
            assert max(len(str(value)) for value in contour.ContourData) <= 16


def test_a_contour_of_more_than_64_kilobytes(series_plan, make_series: Maker, tmp_path: Path) -> None:
    ct = read_ct(make_series(series_plan(size=(128, 128, 2), hu=lambda p: p @ np.array([0.5, 0.25, 0.125]))))
    labels = np.zeros((128, 128, 2), np.uint8)
    labels[1:-1, 1:-1, 0] = 1
    labels[2:-2:2, 2:-2:2, 0] = 0
    write(tmp_path / "rt.dcm", ct, labels)
    dataset = pydicom.dcmread(tmp_path / "rt.dcm")
    (contour,) = dataset.ROIContourSequence[0].ContourSequence
    assert len(contour.get_item("ContourData").value) > 2**16
    np.testing.assert_array_equal(read_labels([dataset], ct, BOTH[:1]).labels.array, labels)


def test_an_empty_structure_has_no_contours(series_plan, make_series: Maker, tmp_path: Path) -> None:
    ct = read_ct(make_series(series_plan()))
    labels = np.zeros(ct.volume.geometry.size, np.uint8)
    labels[2, 2, 2] = 2
    assert write(tmp_path / "rt.dcm", ct, labels) == ("'spleen' is nowhere: its ROI has no contours",)
    objects = [pydicom.dcmread(tmp_path / "rt.dcm")]
    found = read_labels(objects, ct, BOTH, allow_missing=True)
    np.testing.assert_array_equal(found.labels.array, labels)
    assert found.notes == (
        "ROI #1: no closed contour, so it is empty",
        "label 1 (#1 'spleen') has no voxel on the CT",
    )
    with pytest.raises(ImageError, match=r"label 1 \(#1 'spleen'\) has no voxel on the CT; ROI #1: no closed contour"):
        read_labels(objects, ct, BOTH)


def test_tilted_and_gappy_and_multi_frame_series(
    series_plan, make_series: Maker, make_enhanced, tmp_path: Path
) -> None:
    ct = read_ct(make_series(series_plan(tilt_degrees=15, missing=(3,), size=(12, 20, 8))), tilt="shear", gaps="fill")
    labels = np.ones(ct.volume.geometry.size, np.uint8)
    write(tmp_path / "rt.dcm", ct, labels)
    dataset = pydicom.dcmread(tmp_path / "rt.dcm")
    contours = dataset.ROIContourSequence[0].ContourSequence
    assert len(contours) == 7, "none on the filled slice"
    for contour in contours:
        image = next(one for one in ct.series if one.value("SOPInstanceUID") == contour.ContourImageSequence[0][
            "ReferencedSOPInstanceUID"].value)  # fmt: skip
        points = np.array(contour.ContourData, float).reshape(-1, 3) - image.position_mm
        low, high = (points @ image.axes.T / image.spacing_mm).min(axis=0), (
            points @ image.axes.T / image.spacing_mm).max(axis=0)  # fmt: skip
        np.testing.assert_allclose([*low, *high], [-0.5, -0.5, 11.5, 19.5], atol=1e-3)
    ct = read_ct(make_enhanced(series_plan()))
    labels = random_labels(ct)
    write(tmp_path / "rt.dcm", ct, labels)
    np.testing.assert_array_equal(read_labels([pydicom.dcmread(tmp_path / "rt.dcm")], ct, BOTH).labels.array, labels)
    (contour, *_) = pydicom.dcmread(tmp_path / "rt.dcm").ROIContourSequence[0].ContourSequence
    assert contour.ContourImageSequence[0].ReferencedFrameNumber >= 1


def test_contours_that_are_not_the_mask_are_never_left_behind(series_plan, make_series, tmp_path, monkeypatch) -> None:
    ct = read_ct(make_series(series_plan()))
    original = module.outlines
    monkeypatch.setattr(module, "outlines", lambda mask: [polygon + np.array([0.6, 0]) for polygon in original(mask)])
    with pytest.raises(OutputError, match=r"voxels of the contours differ from the mask when read back"):
        write(tmp_path / "rt.dcm", ct, random_labels(ct))
    assert not list(tmp_path.glob("*rt.dcm*"))


@pytest.mark.parametrize("drop", [[], ["PatientName", "PatientID", "StudyDate", "StudyID", "AccessionNumber"]])
def test_a_validator_finds_no_error(series_plan, make_series, make_enhanced, tmp_path: Path, drop) -> None:
    tool = shutil.which("dciodvfy")
    if tool is None:
        pytest.skip("no dciodvfy: install dicom3tools")
    for source in (make_series(series_plan(drop=drop)), make_enhanced(series_plan())):
        ct = read_ct(source)
        write(tmp_path / "rt.dcm", ct, random_labels(ct))
        done = subprocess.run([tool, str(tmp_path / "rt.dcm")], capture_output=True, text=True, check=False)
        lines = (done.stdout + done.stderr).splitlines()
        assert [line for line in lines if line.startswith("Error")] == []


# Reading what others drew


def structure_set(*rois: tuple[str, list[tuple[str, NDArray[np.float64]]]]) -> pydicom.Dataset:
    """A structure set of (name, [(type, points)]) as it would be read from a file."""
    dataset = pydicom.Dataset()
    dataset.Modality = "RTSTRUCT"
    dataset.StructureSetROISequence, dataset.ROIContourSequence = [], []
    for number, (name, contours) in enumerate(rois, 1):
        roi, item = pydicom.Dataset(), pydicom.Dataset()
        roi.ROINumber, roi.ROIName = number, name
        item.ReferencedROINumber = number
        item.ContourSequence = []
        for kind, points in contours:
            contour = pydicom.Dataset()
            contour.ContourGeometricType = kind
            contour.ContourData = [f"{value:.4f}" for value in np.ravel(points)]
            item.ContourSequence.append(contour)
        dataset.StructureSetROISequence.append(roi)
        dataset.ROIContourSequence.append(item)
    return dataset


@pytest.fixture
def ct(series_plan, make_series: Maker) -> DicomCT:
    """20 x 20 x 5 voxels of 1 x 1 x 2 mm from (0, 0, 0) on."""
    return read_ct(make_series(series_plan(size=(20, 20, 5), spacing_mm=(1, 1, 2), origin_mm=(0, 0, 0))))


def square(low: float, high: float, z_mm: float = 4.0) -> NDArray[np.float64]:
    return np.array([(low, low, z_mm), (high, low, z_mm), (high, high, z_mm), (low, high, z_mm)])


def closed(*squares: NDArray[np.float64]) -> list[tuple[str, NDArray[np.float64]]]:
    return [("CLOSED_PLANAR", points) for points in squares]


def read(dataset: pydicom.Dataset, ct: DicomCT, *choices: str, **options: Any) -> DicomLabels:
    return read_labels([dataset], ct, [parse_choice(text) for text in choices or ("1=#1",)], **options)


def test_a_contour_repeated_25_times_is_one(ct: DicomCT) -> None:
    expected = np.zeros((20, 20, 5), np.uint8)
    expected[3:12, 3:12, 2] = 1
    found = read(structure_set(("a", closed(*[square(2.5, 11.5)] * 25))), ct)
    np.testing.assert_array_equal(found.labels.array, expected)
    assert found.notes == ()


def test_inner_contours_are_holes_keyholes_too(ct: DicomCT) -> None:
    expected = np.zeros((20, 20, 5), np.uint8)
    expected[3:16, 3:16, 2] = 1
    expected[6:10, 6:10, 2] = 0
    inner = square(5.5, 9.5)
    np.testing.assert_array_equal(
        read(structure_set(("a", closed(inner, square(2.5, 15.5)))), ct).labels.array, expected
    )
    outer = square(2.5, 15.5)
    keyhole = np.vstack([outer, outer[:1], inner, inner[:1]])  # there and back along one line
    np.testing.assert_array_equal(read(structure_set(("a", closed(keyhole))), ct).labels.array, expected)
    exclusive = [("CLOSEDPLANAR_XOR", points) for points in (outer, inner)]
    np.testing.assert_array_equal(read(structure_set(("a", exclusive)), ct).labels.array, expected)


def test_what_encloses_nothing_is_left_out_and_told(ct: DicomCT) -> None:
    contours = [
        ("POINT", np.array([[1.0, 1.0, 4.0]])),
        ("POINT", np.array([[2.0, 1.0, 4.0]])),
        ("OPEN_PLANAR", square(1, 5)),
        ("CLOSED_PLANAR", square(1, 5)[:2]),
        ("CLOSED_PLANAR", square(1.5, 5.5)),
    ]
    found = read(structure_set(("a", contours)), ct)
    assert found.labels.array.sum() == 16
    assert found.notes == (
        "ROI #1: 2 x POINT left out",
        "ROI #1: 1 x OPEN_PLANAR left out",
        "ROI #1: 1 x contour of fewer than 3 points left out",
    )
    with pytest.raises(
        ImageError, match=r"label 1 .* has no voxel on the CT; ROI #1: no closed contour, so it is empty"
    ):
        read(structure_set(("a", [])), ct)


@pytest.mark.parametrize("shift", [(500, 0, 0), (-500, 0, 0), (0, 500, 0), (0, -500, 0), (19, 0, 0), (0, 0, 500)])
def test_contours_outside_the_image_are_no_empty_label_map(ct: DicomCT, shift: tuple[int, int, int]) -> None:
    away = square(2.5, 11.5) + np.array(shift)
    lost = structure_set(("a", closed(away)), ("b", closed(square(1.5, 5.5))))
    where = "above or below all images" if shift[2] else "beside the images"
    for choices in (["1=a"], ["1=a", "2=b"]):
        with pytest.raises(ImageError, match=rf"label 1 \(#1 'a'\) has no voxel on the CT; ROI #1: 1 contours {where}"):
            read(lost, ct, *choices)
    found = read(lost, ct, "1=a", "2=b", allow_missing=True)
    assert np.bincount(found.labels.array.ravel(), minlength=3).tolist()[1:] == [0, 16]
    assert "label 1 (#1 'a') has no voxel on the CT" in found.notes
    partly = read(structure_set(("a", closed(square(2.5, 11.5), away))), ct)
    assert partly.labels.array.sum() == 81
    assert any(f"1 contours {where}" in note for note in partly.notes)


def test_contours_lie_on_images_or_are_refused(ct: DicomCT) -> None:
    for z_mm in (4.15, 3.85):
        assert read(structure_set(("a", closed(square(1.5, 5.5, z_mm)))), ct).labels.array[:, :, 2].sum() == 16
    with pytest.raises(ImageError, match=r"ROI #1: 1 contours lie between images of the CT or across them, up to 1 mm"):
        read(structure_set(("a", closed(square(1.5, 5.5), square(1.5, 5.5, 5.0)))), ct)
    slanted = square(1.5, 5.5) + np.array([[0, 0, 0], [0, 0, 0], [0, 0, 3], [0, 0, 3]])
    with pytest.raises(ImageError, match="across them"):
        read(structure_set(("a", closed(slanted))), ct)
    found = read(structure_set(("a", closed(square(1.5, 5.5, 0), square(1.5, 5.5, 4), square(1.5, 5.5, 20)))), ct)
    assert found.notes == (
        "ROI #1: 1 contours above or below all images of the CT left out",
        "ROI #1: contours on 2 of the 3 images that it spans",
    )


def test_overlapping_rois(ct: DicomCT) -> None:
    dataset = structure_set(("a", closed(square(1.5, 8.5))), ("b", closed(square(5.5, 12.5))))
    with pytest.raises(ImageError, match="labels overlap in 9 voxels"):
        read(dataset, ct, "1=a", "2=b")
    assert np.bincount(read(dataset, ct, "1=a", "2=b", overlap="first").labels.array.ravel())[1:].tolist() == [49, 40]
    assert np.bincount(read(dataset, ct, "1=a", "2=b", overlap="last").labels.array.ravel())[1:].tolist() == [40, 49]
    assert read(dataset, ct, "3=/^[ab]$/").labels.array.sum() == 3 * 89, "one structure in two parts"


@pytest.mark.parametrize("data", [["1", "2"], ["1", "2", "nan"] * 3, ["1e999", "2", "3"] * 3])
def test_broken_coordinates(ct: DicomCT, data: list[str]) -> None:
    dataset = structure_set(("a", closed(square(1, 5))))
    element = dataset.ROIContourSequence[0].ContourSequence[0]
    text = "\\".join(data).encode()
    element[0x30060050] = pydicom.dataelem.RawDataElement(
        pydicom.tag.Tag(0x30060050), "DS", len(text), text, 0, True, True
    )
    with pytest.raises(ImageError, match=r"RTSTRUCT|finite"):
        read(dataset, ct)


@pytest.mark.parametrize(("name", "limit"), [("MAX_POINTS", 10), ("MAX_CONTOURS", 2)])
def test_too_many_points_are_refused(ct: DicomCT, monkeypatch, name: str, limit: int) -> None:
    dataset = structure_set(("a", closed(square(1, 5), square(6, 9), square(10, 12))))
    monkeypatch.setattr(f"ctseg.io.dicom.rtstruct_read.{name}", limit)
    with pytest.raises(ImageError, match=rf"more than .*{limit} .*choose fewer ROIs"):
        read(dataset, ct)
    monkeypatch.undo()
    assert read(dataset, ct).labels.array.any()


# Choosing regions

KNOWN = [
    Region(number=1, name="Lung-Left", codes=("SCT:39607008",)),
    Region(number=2, name="Lung L"),
    Region(number=7, name=" liver ", codes=("SRT:T-62000",)),
]


def choose(known: list[Region], *choices: str, allow_missing: bool = False) -> dict[int, int]:
    parsed = [parse_choice(text) for text in choices]
    values = choose_regions(known, parsed)
    check_found(values.values(), known, parsed, allow_missing=allow_missing)
    return values


@pytest.mark.parametrize(
    ("pattern", "numbers"),
    [
        ("lung-left", {1}),
        ("LIVER", {7}),
        ("#2", {2}),
        ("/^lung/", {1, 2}),
        ("/LUNG.*(left|L$)/", {1, 2}),
        ("code:srt:t-62000", {7}),
        ("code:SCT:39607008", {1}),
    ],
)
def test_patterns(pattern: str, numbers: set[int]) -> None:
    assert choose(KNOWN, f"5={pattern}") == dict.fromkeys(numbers, 5)


@pytest.mark.parametrize(
    ("choices", "problem"),
    [
        (["1=spleen"], "nothing matches 1=spleen; it has #1 'Lung-Left', #2 'Lung L', #7 'liver'"),
        (["1=liver", "2=/[/"], "--label 2=/[/: not a regular expression"),
        (["1=/lung/", "2=#2"], "segment #2 'Lung L' matches labels [1, 2]; make the patterns differ"),
        (["liver"], "--label liver: expected VALUE=PATTERN with a value in 1..255"),
        (["0=liver"], "expected VALUE=PATTERN"),
        (["256=liver"], "expected VALUE=PATTERN"),
        (["1="], "expected VALUE=PATTERN"),
        (["1=#x"], "expected a number after '#'"),
        (["1=code:1"], "expected code:SCHEME:VALUE"),
    ],
)
def test_wrong_choices(choices: list[str], problem: str) -> None:
    known = [Region(number=r.number, name=r.name.strip()) for r in KNOWN]
    with pytest.raises(CtsegError) as caught:
        choose(known, *choices)
    assert problem in str(caught.value)


def test_alternatives_and_missing_structures() -> None:
    choices = ["1=spleen", "1=Lung L", "2=liver"]
    assert choose(KNOWN, *choices) == {2: 1, 7: 2}
    with pytest.raises(ImageError, match="nothing matches 3=kidney"):
        choose(KNOWN, *choices, "3=kidney")
    assert choose(KNOWN, *choices, "3=kidney", allow_missing=True) == {2: 1, 7: 2}
    with pytest.raises(ImageError, match="nothing matches 3=kidney"):
        choose(KNOWN, "3=kidney", allow_missing=True)


# Real files


def test_a_published_mask_from_its_contours(real_data: Path) -> None:
    """STS_001: 32 contours of 4 to 200 points; the published mask is their plain polygon fill."""
    found = find_series([real_data / "sts_lesion" / "STS_001_dicom_rtstruct.zip"])
    ct = read_series(select_series(found, None))
    (other,) = found.others
    labels = read(read_dataset(other.source), ct, "1=gtv_mass_ct").labels
    published = read_image_labels(real_data / "sts_lesion" / "STS_001_lesion.nii.gz")
    assert labels.geometry.agrees_with(published.geometry)
    assert published.array.sum() == 117145
    np.testing.assert_array_equal(labels.array, published.array)


@pytest.mark.filterwarnings("ignore")
def test_broken_references_do_not_matter(real_data: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(real_data / "seg_rtstruct_refs" / "rt_utils.zip").extractall(tmp_path)
    ct = read_ct(tmp_path)
    sums = {}
    for name in ("invalid_reference_rt", "non_existent_reference_rt"):
        dataset = pydicom.dcmread(tmp_path / "rt_utils" / f"{name}.dcm")
        sums[name] = read(dataset, ct, "1=roi-2").labels.array.sum()
        assert [region.name for region in regions_of(dataset)] == ["ROI-1", "ROI-2", "ROI-3", "ROI-4"]
    assert len(set(sums.values())) == 1
    assert sums["invalid_reference_rt"] > 0


@pytest.mark.filterwarnings("ignore")
def test_contours_far_from_the_only_image_are_told(real_data: Path, tmp_path: Path) -> None:
    """dicompyler's example: ten ROIs drawn on some hundred images, of which one is here."""
    zipfile.ZipFile(real_data / "seg_rtstruct_refs" / "dicompyler.zip").extractall(tmp_path)
    dataset = pydicom.dcmread(tmp_path / "dicompyler" / "example_data" / "rtss.dcm")
    assert [r.name for r in regions_of(dataset)][:5] == ["BODY", "Areola", "Borders", "Breast", "Heart"]
    (image,) = find_series([tmp_path / "dicompyler"]).series[0]
    from ctseg.io.dicom.placing import Stack
    from ctseg.io.dicom.rtstruct_read import roi_masks

    notes: list[str] = []
    found = list(roi_masks(dataset, {1, 2, 5}, Stack.of([image]), notes))
    assert [number for number, _, _ in found] == [1]
    assert found[0][2].mean() > 0.05
    assert notes[0] == "ROI #2: no closed contour, so it is empty"
    assert notes[-1] == "ROI #5: 33 contours above or below all images of the CT left out"


def test_damaged_bytes_are_refused_or_read(series_plan, make_series: Maker, tmp_path: Path) -> None:
    """Never a traceback: 200 files with a few bytes changed or the end cut off."""
    ct = read_ct(make_series(series_plan()))
    write(tmp_path / "rt.dcm", ct, random_labels(ct))
    good = (tmp_path / "rt.dcm").read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        data = bytearray(good[: int(random.integers(400, len(good)))] if random.random() < 0.2 else good)
        for place in random.integers(132, len(data), 40):
            data[place] = int(random.integers(256))
        (tmp_path / "bad.dcm").write_bytes(data)
        with pydicom_silent():
            try:
                read(read_dataset(Source(tmp_path / "bad.dcm")), ct, "1=/./")
            except ImageError:
                refused += 1
    assert refused > 20
