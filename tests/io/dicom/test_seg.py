"""SEG out and in: highdicom finds every voxel where the mask has it in the patient; real files match their truth."""

import dataclasses
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from itertools import permutations, product
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK
from numpy.typing import NDArray

from ctseg.codes import ANATOMY, Algorithm, Code, Structure, structures_of, uncoded
from ctseg.errors import ImageError, OutputError
from ctseg.io.dicom import seg as module
from ctseg.io.dicom.files import Source
from ctseg.io.dicom.headers import read_dataset
from ctseg.io.dicom.labels import read_labels, regions_of
from ctseg.io.dicom.placing import Stack
from ctseg.io.dicom.read import DicomCT, find_series, read_series, select_series
from ctseg.io.dicom.regions import parse_choice
from ctseg.io.dicom.seg import write_seg
from ctseg.io.dicom.seg_pixels import decode
from ctseg.io.dicom.seg_read import segment_masks
from ctseg.io.dicom.silence import pydicom_silent
from ctseg.recipe import load_recipe

Maker = Callable[..., Path]
SPLEEN = Structure(value=1, name="spleen", category=ANATOMY, type=Code(value="78961009", meaning="Spleen"))
THING = uncoded(2, "thing")
ALGORITHM = Algorithm(name="spleen:small", version="1.2.3", model="0123456789abcdef")
DIRECTIONS = [
    (tuple(np.array(row) * a), tuple(np.array(column) * b))
    for row, column in permutations(((1, 0, 0), (0, 1, 0), (0, 0, 1)), 2)
    for a, b in product((1, -1), repeat=2)
]
"""Of rows and columns: with both orders of slices, the 48 orientations."""


def read_ct(path: Path, **policies: str) -> DicomCT:
    return read_series(select_series(find_series([path]), None), **policies)


def random_labels(ct: DicomCT, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).choice(np.array([0, 0, 1, 2], np.uint8), ct.volume.geometry.size)


def write(path: Path, ct: DicomCT, labels: NDArray[np.uint8], **options: Any) -> tuple[str, ...]:
    return write_seg(path, ct, labels, [SPLEEN, THING], ALGORITHM, **options)


def at_places(path: Path, affine: NDArray[np.float64], size: tuple[int, ...]) -> NDArray[np.uint8]:
    """What highdicom reads of a SEG at the voxels of a grid; every labelled voxel of the SEG must be on it."""
    volume = highdicom.seg.segread(path).get_volume(combine_segments=True, allow_missing_positions=True)
    indices = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), axis=-1)
    there = np.linalg.inv(volume.affine) @ affine
    found = indices @ there[:3, :3].T + there[:3, 3]
    rounded = np.rint(found).astype(int)
    assert np.abs(found - rounded).max() < 1e-3
    labels = np.zeros(size, np.uint8)
    inside = ((rounded >= 0) & (rounded < volume.array.shape)).all(axis=-1)
    labels[inside] = volume.array[tuple(rounded[inside].T)]
    assert np.count_nonzero(labels) == np.count_nonzero(volume.array)
    return labels


@pytest.mark.parametrize("order", ["ascending", "descending"])
@pytest.mark.parametrize("axes", DIRECTIONS, ids=lambda axes: " ".join(str(int(v)) for v in np.ravel(axes)))
def test_highdicom_finds_the_mask_where_it_is(series_plan, make_series: Maker, tmp_path: Path, axes, order) -> None:
    numbers = {"ascending": lambda n: n + 1, "descending": lambda n: 60 - n}
    ct = read_ct(make_series(series_plan(axes=axes, size=(6, 5, 4), instance_numbers=numbers[order])))
    labels = random_labels(ct)
    write(tmp_path / "seg.dcm", ct, labels)
    np.testing.assert_array_equal(at_places(tmp_path / "seg.dcm", ct.volume.geometry.affine, labels.shape), labels)


@pytest.mark.parametrize("seg_type", ["binary", "labelmap"])
@pytest.mark.parametrize("axes", ["coronal", "oblique"])
def test_both_types_and_our_own_reader(series_plan, make_series: Maker, tmp_path: Path, seg_type, axes) -> None:
    ct = read_ct(make_series(series_plan(axes=axes)))
    labels = random_labels(ct)
    write(tmp_path / "seg.dcm", ct, labels, seg_type=seg_type)
    np.testing.assert_array_equal(at_places(tmp_path / "seg.dcm", ct.volume.geometry.affine, labels.shape), labels)
    dataset = pydicom.dcmread(tmp_path / "seg.dcm")
    assert dataset.SegmentationType == seg_type.upper()
    found = read_labels([dataset], ct, [parse_choice("1=code:SCT:78961009"), parse_choice("2=Thing")])
    np.testing.assert_array_equal(found.labels.array, labels)
    assert found.notes == ()


def test_frames_refer_to_the_images_they_lie_on(series_plan, make_series: Maker, tmp_path: Path) -> None:
    folder = make_series(series_plan(instance_numbers=lambda n: 60 - n))
    ct = read_ct(folder)
    write(tmp_path / "seg.dcm", ct, random_labels(ct))
    sources = {d.SOPInstanceUID: d for d in map(pydicom.dcmread, folder.iterdir())}
    dataset = pydicom.dcmread(tmp_path / "seg.dcm")
    assert dataset.NumberOfFrames == 12
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        (reference,) = frame.DerivationImageSequence[0].SourceImageSequence
        source = sources[reference.ReferencedSOPInstanceUID]
        place = frame.PlanePositionSequence[0].ImagePositionPatient
        np.testing.assert_allclose(place, source.ImagePositionPatient, atol=1e-6)
    series = dataset.ReferencedSeriesSequence[0]
    (first, *_) = sources.values()
    assert series.SeriesInstanceUID == first.SeriesInstanceUID
    assert dataset.StudyInstanceUID == first.StudyInstanceUID
    assert dataset.FrameOfReferenceUID == first.FrameOfReferenceUID
    assert {r.ReferencedSOPInstanceUID for r in series.ReferencedInstanceSequence} == set(sources)
    assert (dataset.PatientName, dataset.PatientID) == (first.PatientName, first.PatientID)


def test_multi_frame_ct(series_plan, make_enhanced: Maker, tmp_path: Path) -> None:
    path = make_enhanced(series_plan(axes="oblique"))
    ct = read_ct(path)
    labels = random_labels(ct)
    write(tmp_path / "seg.dcm", ct, labels)
    np.testing.assert_array_equal(at_places(tmp_path / "seg.dcm", ct.volume.geometry.affine, labels.shape), labels)
    source = pydicom.dcmread(path)
    for frame in pydicom.dcmread(tmp_path / "seg.dcm").PerFrameFunctionalGroupsSequence:
        (reference,) = frame.DerivationImageSequence[0].SourceImageSequence
        assert reference.ReferencedSOPInstanceUID == source.SOPInstanceUID
        theirs = source.PerFrameFunctionalGroupsSequence[reference.ReferencedFrameNumber - 1]
        np.testing.assert_allclose(
            frame.PlanePositionSequence[0].ImagePositionPatient,
            theirs.PlanePositionSequence[0].ImagePositionPatient,
            atol=1e-6,
        )


@pytest.mark.parametrize(("keep", "frames"), [(False, 3), (True, 12)])
def test_empty_frames_are_left_out_or_kept(series_plan, make_series: Maker, tmp_path: Path, keep, frames) -> None:
    ct = read_ct(make_series(series_plan()))
    labels = np.zeros(ct.volume.geometry.size, np.uint8)
    labels[2:5, 3, 1:3], labels[1, 1, 5] = 1, 2
    write(tmp_path / "seg.dcm", ct, labels, keep_empty_frames=keep)
    assert pydicom.dcmread(tmp_path / "seg.dcm").NumberOfFrames == frames
    np.testing.assert_array_equal(at_places(tmp_path / "seg.dcm", ct.volume.geometry.affine, labels.shape), labels)


@pytest.mark.parametrize(("keep", "frames"), [(False, 2), (True, 12)])
@pytest.mark.parametrize("seg_type", ["binary", "labelmap"])
def test_an_empty_mask_is_an_empty_seg(
    series_plan, make_series, tmp_path: Path, keep, frames, seg_type, caplog
) -> None:
    ct = read_ct(make_series(series_plan()))
    labels = np.zeros(ct.volume.geometry.size, np.uint8)
    notes = write(tmp_path / "seg.dcm", ct, labels, keep_empty_frames=keep, seg_type=seg_type)
    dataset = pydicom.dcmread(tmp_path / "seg.dcm")
    assert dataset.NumberOfFrames == (frames if seg_type == "binary" else frames // 2)
    assert not dataset.pixel_array.any()
    assert any("the mask is empty" in note for note in notes) != keep
    assert not caplog.records


def test_a_filled_gap_has_no_frame(series_plan, make_series: Maker, tmp_path: Path) -> None:
    ct = read_ct(make_series(series_plan(missing=(2,))), gaps="fill")
    labels = np.ones(ct.volume.geometry.size, np.uint8)
    write(tmp_path / "seg.dcm", ct, labels)
    assert pydicom.dcmread(tmp_path / "seg.dcm").NumberOfFrames == 5
    expected = labels.copy()
    expected[:, :, 2] = 0
    np.testing.assert_array_equal(at_places(tmp_path / "seg.dcm", ct.volume.geometry.affine, labels.shape), expected)
    back = read_labels([pydicom.dcmread(tmp_path / "seg.dcm")], ct, [parse_choice("1=spleen")])
    np.testing.assert_array_equal(back.labels.array, labels), "the filled slice takes its neighbour's labels"


def test_shear_is_undone(series_plan, make_series: Maker, tmp_path: Path) -> None:
    """A mask of half the patient, cut by a plane in space: each frame has it where its own pixels are."""
    folder = make_series(series_plan(tilt_degrees=20, size=(12, 30, 8)))
    ct = read_ct(folder, tilt="shear")
    affine = ct.volume.geometry.affine
    indices = np.stack(np.meshgrid(*map(np.arange, ct.volume.geometry.size), indexing="ij"), axis=-1)
    cut_mm = 32.0
    labels = ((indices @ affine[:3, :3].T + affine[:3, 3])[..., 1] > cut_mm).astype(np.uint8)
    write(tmp_path / "seg.dcm", ct, labels)
    dataset = pydicom.dcmread(tmp_path / "seg.dcm")
    sources = {d.SOPInstanceUID: d for d in map(pydicom.dcmread, folder.iterdir())}
    assert dataset.NumberOfFrames == 8
    for frame, pixels in zip(dataset.PerFrameFunctionalGroupsSequence, dataset.pixel_array, strict=True):
        source = sources[frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID]
        y_mm = source.ImagePositionPatient[1] + np.arange(source.Rows) * source.PixelSpacing[0]
        doubtful = np.abs(y_mm - cut_mm) <= source.PixelSpacing[0]  # a row: shifted by the nearest pixel
        np.testing.assert_array_equal(pixels[~doubtful].astype(bool), np.tile((y_mm > cut_mm)[~doubtful, None], 12))
    write(tmp_path / "all.dcm", ct, np.ones_like(labels))
    back, covered = (
        read_labels([pydicom.dcmread(tmp_path / f"{name}.dcm")], ct, [parse_choice("1=#1")]).labels.array
        for name in ("seg", "all")
    )
    assert 0.5 < covered.mean() < 1, "the grid has grown beyond its sources"
    np.testing.assert_array_equal(back, labels * covered)


def test_recipes_say_what_their_structures_are(series_plan, make_series: Maker, tmp_path: Path) -> None:
    ct = read_ct(make_series(series_plan()))
    labels = (random_labels(ct) > 0).astype(np.uint8)
    expected = {
        "spleen": ("91723000", "78961009", None),
        "lung": ("91723000", "39607008", None),
        "lung_soft_dice": ("91723000", "39607008", None),
        "bone_lesion": ("49755003", "52988006", "272673000"),
    }
    for name, codes in expected.items():
        notes = write_seg(tmp_path / "seg.dcm", ct, labels, structures_of(load_recipe(name)), ALGORITHM)
        assert notes == ()
        (segment,) = pydicom.dcmread(tmp_path / "seg.dcm").SegmentSequence
        region = segment.get("AnatomicRegionSequence")
        assert codes == (
            segment.SegmentedPropertyCategoryCodeSequence[0].CodeValue,
            segment.SegmentedPropertyTypeCodeSequence[0].CodeValue,
            region[0].CodeValue if region else None,
        )
    algorithm = segment.SegmentationAlgorithmIdentificationSequence[0]
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("ctseg spleen:small", "1.2.3")
    assert segment.SegmentAlgorithmType == "AUTOMATIC"
    assert len(segment.RecommendedDisplayCIELabValue) == 3


def test_a_renamed_label_loses_the_code() -> None:
    """`--set labels.1=liver` on the spleen recipe must not write livers as spleens."""
    (structure,) = structures_of(load_recipe("spleen", ["labels.1=liver"]))
    assert (structure.type.scheme, structure.type.meaning) == ("99CTSEG", "liver")


PATIENT_TAGS = [
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber",
    "StudyID", "ReferringPhysicianName", "SeriesNumber", "SliceThickness", "PositionReferenceIndicator",
]  # fmt: skip


def test_missing_patient_tags_stop_nothing(series_plan, make_series: Maker, tmp_path: Path) -> None:
    ct = read_ct(make_series(series_plan(drop=PATIENT_TAGS)))
    labels = random_labels(ct)
    assert write(tmp_path / "seg.dcm", ct, labels) == ("'thing' has no code in the recipe: named by one of our own",)
    dataset = pydicom.dcmread(tmp_path / "seg.dcm")
    for keyword in PATIENT_TAGS[:9]:
        assert not dataset[keyword].value, "present and empty, as type 2 wants"
    np.testing.assert_array_equal(at_places(tmp_path / "seg.dcm", ct.volume.geometry.affine, labels.shape), labels)


def test_wrong_patient_tags_are_left_empty_and_told(series_plan, make_series: Maker, tmp_path: Path) -> None:
    def spoil(dataset: pydicom.Dataset, n: int) -> None:
        with pydicom.config.disable_value_validation():
            dataset.PatientSex = "female"
            dataset.StudyDate = "2nd of May"
            dataset.PatientBirthDate = "19999999"
            dataset.StudyTime = "997799"
            dataset.PatientAge = "old"
            dataset.SeriesNumber = "-7"
            dataset.PatientName = "Doe"  # of which highdicom would say, aloud, that it is no name

    with pydicom_silent():
        folder = make_series(series_plan(change=spoil, drop=["FrameOfReferenceUID"]))
    ct = read_ct(folder)
    notes = write(tmp_path / "seg.dcm", ct, random_labels(ct))
    for keyword in ("PatientSex", "StudyDate", "PatientAge", "PatientBirthDate", "StudyTime"):
        assert f"{keyword} of the CT breaks DICOM's rules: left empty" in notes
    assert "FrameOfReferenceUID of the CT is missing or breaks DICOM's rules: a new one was made" in notes
    assert not any("female" in note or "old" in note.split() for note in notes), "values may be personal"
    dataset = pydicom.dcmread(tmp_path / "seg.dcm")
    assert (dataset.PatientSex, dataset.StudyDate, "PatientAge" in dataset) == ("", "", False)


def test_axes_that_differ_in_the_last_digit(series_plan, make_series: Maker, tmp_path: Path) -> None:
    def jitter(dataset: pydicom.Dataset, n: int) -> None:
        dataset.ImageOrientationPatient = [1, 0, n * 1e-6, 0, 1, n * 2e-6]

    ct = read_ct(make_series(series_plan(change=jitter)))
    labels = random_labels(ct)
    write(tmp_path / "seg.dcm", ct, labels)
    np.testing.assert_array_equal(at_places(tmp_path / "seg.dcm", ct.volume.geometry.affine, labels.shape), labels)


def test_names_of_segments_cannot_steer_a_terminal(series_plan, make_series: Maker, tmp_path: Path) -> None:
    ct = read_ct(make_series(series_plan()))
    write(tmp_path / "seg.dcm", ct, random_labels(ct))
    dataset = pydicom.dcmread(tmp_path / "seg.dcm")
    with pydicom_silent():
        dataset.SegmentSequence[0].SegmentLabel = "\x1b[31mred" + "x" * 1000
        (first, _) = regions_of(dataset)
    assert first.name.startswith("?[31mred")
    assert len(first.name) == 256


def test_names_in_other_alphabets_survive(series_plan, make_series: Maker, tmp_path: Path) -> None:
    name = "Müller^Jürgen"
    tags = {"SpecificCharacterSet": "ISO_IR 100", "PatientName": name}
    ct = read_ct(make_series(series_plan(tags=tags)))
    write(tmp_path / "seg.dcm", ct, random_labels(ct))
    assert str(pydicom.dcmread(tmp_path / "seg.dcm").PatientName) == name


@pytest.mark.parametrize("in_file_too", [False, True])
def test_an_image_that_lost_its_uid(series_plan, make_series: Maker, tmp_path: Path, in_file_too: bool) -> None:
    """As a real anonymiser left it, in the first lines of the file only; or nowhere at all."""
    kept = []

    def forget(dataset: pydicom.Dataset, n: int) -> None:
        kept.append(str(dataset.SOPInstanceUID))
        dataset.SOPInstanceUID = dataset.StudyInstanceUID = ""

    folder = make_series(series_plan(change=forget))
    if in_file_too:
        for path in folder.iterdir():
            data = path.read_bytes()
            uid = str(pydicom.dcmread(path).file_meta.MediaStorageSOPInstanceUID).encode()
            assert data.count(uid) == 1
            path.write_bytes(data.replace(uid, b"x" * len(uid)))
    ct = read_ct(folder)
    labels = random_labels(ct)
    notes = write(tmp_path / "seg.dcm", ct, labels)
    np.testing.assert_array_equal(at_places(tmp_path / "seg.dcm", ct.volume.geometry.affine, labels.shape), labels)
    series = pydicom.dcmread(tmp_path / "seg.dcm").ReferencedSeriesSequence[0]
    referenced = {str(reference.ReferencedSOPInstanceUID) for reference in series.ReferencedInstanceSequence}
    assert len(referenced) == 6
    assert any("a viewer will not find its images" in note for note in notes) == in_file_too
    assert (referenced == set(kept)) != in_file_too


def test_a_seg_that_is_not_the_mask_is_never_left_behind(series_plan, make_series, tmp_path: Path, monkeypatch) -> None:
    """The kind of fault that viewers cannot see: frames in the wrong order."""
    ct = read_ct(make_series(series_plan()))
    original = module._segmentation
    flipped = lambda drawn, *rest, **more: original(  # noqa: E731  # short
        [(image, mask) for (image, _), (_, mask) in zip(drawn, drawn[::-1], strict=True)], *rest, **more
    )
    monkeypatch.setattr(module, "_segmentation", flipped)
    with pytest.raises(OutputError, match=r"voxels of the SEG read back differ from the mask"):
        write(tmp_path / "seg.dcm", ct, random_labels(ct))
    assert not list(tmp_path.glob("*seg*"))


@pytest.fixture
def dciodvfy() -> Callable[[Path], list[str]]:
    """The errors that dicom3tools' validator finds in a file."""
    tool = shutil.which("dciodvfy")
    if tool is None:
        pytest.skip("no dciodvfy: install dicom3tools")

    def validate(path: Path) -> list[str]:
        done = subprocess.run([tool, str(path)], capture_output=True, text=True, check=False)
        return [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("Error")]

    return validate


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("empty", [False, True])
def test_a_validator_finds_no_error(series_plan, make_series, make_enhanced, tmp_path, dciodvfy, keep, empty) -> None:
    for source in (make_series(series_plan(axes="oblique")), make_enhanced(series_plan())):
        ct = read_ct(source)
        write(tmp_path / "seg.dcm", ct, random_labels(ct) * (not empty), keep_empty_frames=keep)
        assert dciodvfy(tmp_path / "seg.dcm") == []


def test_the_validator_knows_no_label_maps(series_plan, make_series: Maker, tmp_path: Path, dciodvfy) -> None:
    """DICOM added them in 2024. Should this fail, a newer validator is here: expect no errors then."""
    ct = read_ct(make_series(series_plan()))
    write(tmp_path / "seg.dcm", ct, random_labels(ct), seg_type="labelmap")
    errors = dciodvfy(tmp_path / "seg.dcm")
    assert any("Information Object Not found" in error for error in errors)
    assert len([error for error in errors if "SegmentNumber" not in error]) == 1


def refusal(attempt: Callable[[], object]) -> str | None:
    """Why `attempt` is refused, in one line; None if it is not. Anything else than an ImageError fails the test."""
    try:
        attempt()
    except ImageError as error:
        text = str(error)
    else:
        return None
    assert "\n" not in text
    return text


# Real files


@pytest.fixture(scope="session")
def references(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("references")
    for archive in sorted((real_data / "seg_rtstruct_refs").glob("*.zip")):
        zipfile.ZipFile(archive).extractall(folder)
    return folder


def truth(path: Path, ct: DicomCT) -> NDArray[np.int16]:
    """A label map in NRRD as SimpleITK sees it on the CT's grid."""
    geometry = ct.volume.geometry
    grid = SimpleITK.Image([*geometry.size], SimpleITK.sitkUInt8)
    grid.SetSpacing(geometry.spacing_mm)
    grid.SetOrigin(geometry.origin_mm)
    grid.SetDirection(geometry.direction.ravel())
    image = SimpleITK.ReadImage(str(path))
    resampled = SimpleITK.Resample(image, grid, SimpleITK.Transform(), SimpleITK.sitkNearestNeighbor)
    return SimpleITK.GetArrayFromImage(resampled).T


LIVERS = ["dcmqi/liver", *(f"pydicom_data_seg/liver{kind}" for kind in ("", "_deflate", "_expb", "_j2k", "_rle"))]


@pytest.mark.filterwarnings("ignore")  # of pydicom, about what other programs wrote
@pytest.mark.parametrize("name", LIVERS)
def test_every_compression_gives_the_published_mask(references: Path, name: str) -> None:
    ct = read_ct(references / "dcmqi" / "ct-3slice")
    found = read_labels([pydicom.dcmread(references / f"{name}.dcm")], ct, [parse_choice("7=LIVER")])
    expected = truth(references / "dcmqi" / "liver_seg.nrrd", ct)
    assert np.count_nonzero(expected) == 107098
    np.testing.assert_array_equal(found.labels.array, expected * 7)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["", "_deflate", "_j2k", "_rle"])
def test_frames_that_end_within_a_byte(references: Path, kind: str) -> None:
    """510 x 510 pixels: the plain file is pydicom's to decode, the others must agree; and the CT has 512 x 512."""
    path = references / "pydicom_data_seg"
    expected = pydicom.dcmread(path / "liver_nonbyte_aligned.dcm").pixel_array
    dataset = pydicom.dcmread(path / f"liver_nonbyte_aligned{kind}.dcm")
    np.testing.assert_array_equal(np.stack(list(decode(dataset, [0, 1, 2]))), expected)
    with pytest.raises(ImageError, match=r"3 of 3 frames lie on no image of the CT \(510 x 510 pixels, the CT's have"):
        read_labels([dataset], read_ct(references / "dcmqi" / "ct-3slice"), [parse_choice("1=liver")])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", ["24x38x3", "23x38x3"])
def test_small_segs_of_dcmqi(references: Path, size: str) -> None:
    folder = references / "dcmqi" / size
    ct = read_ct(folder / "image")
    found = read_labels([pydicom.dcmread(folder / "seg" / "label.seg")], ct, [parse_choice("1=code:srt:T-62000")])
    expected = truth(folder / "nrrd" / "label.nrrd", ct)
    assert expected.any()
    np.testing.assert_array_equal(found.labels.array, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["noppv", "ppv5"])
def test_sparse_label_maps(references: Path, name: str) -> None:
    """Missing frames are background, whatever value pads the file."""
    ct = read_ct(references / "dcmqi" / "24x38x3" / "image")
    dataset = pydicom.dcmread(references / "dcmqi" / f"sparse-labelmap-{name}.dcm")
    found = read_labels([dataset], ct, [parse_choice("1=liver")])
    expected = truth(references / "dcmqi" / f"sparse_labelmap_{name}_seg.nrrd", ct) == 1
    assert np.count_nonzero(expected) == 630
    np.testing.assert_array_equal(found.labels.array, expected)


@pytest.mark.filterwarnings("ignore")
def test_overlapping_segments(references: Path) -> None:
    ct = read_ct(references / "dcmqi" / "ct-3slice")
    dataset = pydicom.dcmread(references / "dcmqi" / "partial_overlaps.dcm")
    choices = [parse_choice(f"{n}=#{n}") for n in range(1, 6)]
    parts = [truth(references / "dcmqi" / f"partial_overlaps-{n}.nrrd", ct) for n in (1, 2, 3)]
    for n, choice in enumerate(choices, 1):
        alone = read_labels([dataset], ct, [choice]).labels.array
        np.testing.assert_array_equal(alone > 0, np.any([part == n for part in parts], axis=0))
    with pytest.raises(ImageError, match=r"labels overlap in \d+ voxels; choose --overlap first or last"):
        read_labels([dataset], ct, choices)
    first, last = (read_labels([dataset], ct, choices, overlap=overlap) for overlap in ("first", "last"))
    for n in range(1, 6):
        claimed = np.any([part == n for part in parts], axis=0)
        earlier = np.any([(part > 0) & (part < n) for part in parts], axis=0)
        later = np.any([part > n for part in parts], axis=0)
        np.testing.assert_array_equal(first.labels.array == n, claimed & ~earlier)
        np.testing.assert_array_equal(last.labels.array == n, claimed & ~later)
    assert "the one named first was kept" in first.notes[0]


@pytest.mark.filterwarnings("ignore")
def test_fractions_count_from_a_half_on(references: Path, make_series: Maker) -> None:
    dataset = pydicom.dcmread(references / "highdicom" / "seg_image_ct_true_fractional.dcm")
    frames = dataset.PerFrameFunctionalGroupsSequence
    shared = dataset.SharedFunctionalGroupsSequence[0]
    rows_mm, columns_mm = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    axes = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float).reshape(2, 3)
    spacing_mm, size = (columns_mm, rows_mm), (16, 16)
    places = [np.array(frame.PlanePositionSequence[0].ImagePositionPatient, float) for frame in frames]
    (one, *_) = read_ct(make_series()).series
    slices = [dataclasses.replace(one, position_mm=p, axes=axes, spacing_mm=spacing_mm, size=size) for p in places]
    stored = dataset.pixel_array
    assert len(np.unique(stored)) > 1
    for _, index, mask in segment_masks(dataset, {1}, Stack.of(slices)):
        np.testing.assert_array_equal(mask.T, stored[index] / int(dataset.MaximumFractionalValue) >= 0.5)
        assert (stored[index] == 128).any()


@pytest.mark.filterwarnings("ignore")
def test_no_real_file_breaks_the_reader(references: Path) -> None:
    """Each object is read or refused in one line, whatever CT it is asked to lie on."""
    ct = read_ct(references / "dcmqi" / "ct-3slice")
    for path in sorted(references.rglob("*")):
        if path.suffix not in (".dcm", ".seg"):
            continue
        dataset = pydicom.dcmread(path)
        refusal(lambda: (regions_of(dataset), read_labels([dataset], ct, [parse_choice("1=/./")])))  # noqa: B023  # now


@pytest.mark.parametrize(
    ("tag", "reason"),
    [
        (b"\x08\0\x60\0CS", "labels come from SEG or RTSTRUCT objects, got 'None'"),
        (b"\x62\0\x01\0CS", "SegmentationType must be one of BINARY, FRACTIONAL, LABELMAP, got 'None'"),
    ],
)
def test_a_value_of_no_known_kind_is_refused(
    series_plan, make_series: Maker, tmp_path: Path, tag: bytes, reason: str
) -> None:
    """pydicom raises when such a value is asked for, not when the file is read."""
    ct = read_ct(make_series(series_plan()))
    write(tmp_path / "seg.dcm", ct, random_labels(ct))
    data = (tmp_path / "seg.dcm").read_bytes()
    assert data.count(tag) == 1
    (tmp_path / "bad.dcm").write_bytes(data.replace(tag, tag[:-1] + b"\xac"))
    with pydicom_silent():
        bad = read_dataset(Source(tmp_path / "bad.dcm"))
        assert refusal(lambda: read_labels([bad], ct, [parse_choice("1=/./")])) == reason


def test_damaged_bytes_are_refused_or_read(series_plan, make_series: Maker, tmp_path: Path) -> None:
    """Never a traceback: 300 files with a few bytes changed or the end cut off."""
    ct = read_ct(make_series(series_plan()))
    write(tmp_path / "seg.dcm", ct, random_labels(ct))
    good = (tmp_path / "seg.dcm").read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        data = bytearray(good[: int(random.integers(400, len(good)))] if random.random() < 0.2 else good)
        for place in random.integers(132, len(data), 5):
            data[place] = int(random.integers(256))
        (tmp_path / "bad.dcm").write_bytes(data)
        with pydicom_silent():
            bad = Source(tmp_path / "bad.dcm")
            refused += refusal(lambda: read_labels([read_dataset(bad)], ct, [parse_choice("1=/./")])) is not None  # noqa: B023
    assert refused > 20
