"""A CT written as DICOM series is the same CT to SimpleITK, voxel for voxel and millimetre for millimetre."""

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK

from ctseg.errors import OutputError
from ctseg.io.dicom import write
from ctseg.io.dicom.write import write_series
from ctseg.volume import Geometry, Volume, to_ras


def tilted(angle_degrees: float) -> np.ndarray:
    """A rotation about an axis that is none of the patient's."""
    axis = np.array([1.0, 2.0, 3.0]) / np.sqrt(14)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    angle = np.deg2rad(angle_degrees)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def volume(dtype: str, direction: np.ndarray, scale: float = 1.0) -> Volume:
    geometry = Geometry.from_parts((7, 5, 4), (0.7, 0.8, 2.5), (-12.25, 30.5, 100.125), direction)
    values = np.random.default_rng(0).integers(-1024, 3000, geometry.size) * scale
    return Volume(np.asfortranarray(values.astype(dtype)), geometry)


def read_back(folder: Path) -> tuple[np.ndarray, Geometry]:
    """By SimpleITK's GDCM series reader: HU `[x, y, z]` and grid."""
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    direction = np.array(image.GetDirection()).reshape(3, 3)
    grid = Geometry.from_parts(image.GetSize(), image.GetSpacing(), image.GetOrigin(), direction)
    return SimpleITK.GetArrayFromImage(image).T, grid


FLIPS = {
    "right-handed": np.eye(3),
    "left-handed": np.diag([1.0, 1.0, -1.0]),
    "x to the right": np.diag([-1.0, 1.0, 1.0]),
}
DIRECTIONS = {
    **FLIPS,
    "coronal": np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]),
    "oblique": tilted(25),
    "oblique, left-handed": tilted(-40) @ np.diag([1.0, -1.0, 1.0]),
}


@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
def test_whole_numbers_come_back_exactly_on_their_place(tmp_path: Path, direction: np.ndarray) -> None:
    """Compared in one axis order: DICOM knows no left-handed grid, so a reader may turn the slices' order."""
    ct = volume("int16", direction)
    assert write_series(tmp_path / "ct", ct) == 0.0
    array, grid = read_back(tmp_path / "ct")
    ours, theirs = to_ras(ct), to_ras(Volume(array, grid))
    np.testing.assert_array_equal(theirs.array, ours.array)
    np.testing.assert_allclose(theirs.geometry.affine, ours.geometry.affine, atol=1e-6)


def test_float_whole_numbers_come_back_exactly(tmp_path: Path) -> None:
    ct = volume("float32", np.eye(3))
    assert write_series(tmp_path / "ct", ct) == 0.0
    np.testing.assert_array_equal(read_back(tmp_path / "ct")[0], ct.array)


@pytest.mark.parametrize(("dtype", "scale"), [("float32", 1.37), ("int32", 40), ("float64", 1e-4)])
def test_what_needs_more_than_16_bits_is_off_by_half_a_step_at_most_and_says_so(
    tmp_path: Path, dtype: str, scale: float
) -> None:
    ct = volume(dtype, np.eye(3), scale)
    told = write_series(tmp_path / "ct", ct)
    step = (float(ct.array.max()) - float(ct.array.min())) / 65535
    array, _ = read_back(tmp_path / "ct")
    assert told <= step * 0.5001
    np.testing.assert_allclose(array, ct.array, rtol=0, atol=told * 1.001 + 1e-3 * step)


def test_a_slice_tells_its_place_and_nothing_of_a_patient(tmp_path: Path) -> None:
    ct = volume("int16", tilted(10))
    write_series(tmp_path / "ct", ct, "x" * 100)
    files = sorted((tmp_path / "ct").iterdir())
    assert [file.name for file in files] == ["0001.dcm", "0002.dcm", "0003.dcm", "0004.dcm"]
    headers = [pydicom.dcmread(file) for file in files]
    for index, header in enumerate(headers):
        place = ct.geometry.affine @ [0, 0, index, 1]
        np.testing.assert_allclose(np.array(header.ImagePositionPatient, float), place[:3], atol=1e-9)
        np.testing.assert_array_equal(header.pixel_array, ct.array[:, :, index].T)
        for keyword in ("PatientName", "PatientID", "PatientBirthDate", "AccessionNumber"):
            assert header[keyword].is_empty
    assert len({header.SOPInstanceUID for header in headers}) == 4
    assert len({header.SeriesInstanceUID for header in headers}) == 1
    assert headers[0].PixelSpacing == [0.8, 0.7]
    assert len(headers[0].SeriesDescription) == 64


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="not an empty folder"):
        write_series(tmp_path, volume("int16", np.eye(3)))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_at_the_second(stored: Any, *others: Any) -> Any:
        if list(tmp_path.rglob("0001.dcm")):
            raise KeyboardInterrupt
        return convert(stored, *others)

    convert = write._stored
    monkeypatch.setattr(write, "_stored", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        write_series(tmp_path / "ct", volume("int16", np.eye(3)))
    assert list(tmp_path.iterdir()) == []
