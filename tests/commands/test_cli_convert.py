"""`ctseg convert`: what arrives is the same CT to SimpleITK, whole archives become data sets, and nobody is named."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK

from ctseg.io.dicom.write import write_series
from ctseg.io.images import read_image, write_image, write_labels
from ctseg.manifest import read_manifest
from ctseg.privacy import KEY_VARIABLE
from ctseg.volume import Geometry, Volume, to_ras

PATIENT = "Mustermann^Erika"


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "k" * 32)


@pytest.fixture
def ct() -> Volume:
    geometry = Geometry.from_parts((12, 10, 6), (0.7, 0.8, 2.5), (-12.25, 30.5, 100.0), np.eye(3))
    return Volume(
        np.asfortranarray(np.random.default_rng(0).integers(-1024, 3000, (12, 10, 6)).astype(np.int16)), geometry
    )


@pytest.fixture
def archive(ct: Volume, tmp_path: Path) -> Path:
    """Three patients as a hospital would hand them out, the last with a slice missing."""
    for number in range(3):
        folder = tmp_path / "archive" / f"patient{number}" / "study"
        folder.parent.mkdir(parents=True)
        write_series(folder, Volume(ct.array + np.int16(number), ct.geometry))
        for path in folder.iterdir():
            header = pydicom.dcmread(path)
            header.PatientName, header.PatientID, header.PatientBirthDate = PATIENT, f"ID-{number}", "19640812"
            header.save_as(path)
    (tmp_path / "archive" / "patient2" / "study" / "0003.dcm").unlink()
    return tmp_path / "archive"


def uids(archive: Path) -> list[str]:
    return [str(pydicom.dcmread(path).SeriesInstanceUID) for path in sorted(archive.rglob("0001.dcm"))]


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_a_series_becomes_a_file_that_simpleitk_reads_as_the_same_ct(
    cli: Callable, ct: Volume, tmp_path: Path, suffix: str
) -> None:
    write_series(tmp_path / "dicom", ct)
    assert cli("convert", "dicom", f"new/ct{suffix}").code == 0
    image = SimpleITK.ReadImage(str(tmp_path / "new" / f"ct{suffix}"))
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(image).T, ct.array)
    np.testing.assert_allclose(image.GetOrigin(), ct.geometry.origin_mm, atol=1e-4)
    np.testing.assert_allclose(image.GetSpacing(), ct.geometry.spacing_mm, atol=1e-5)
    np.testing.assert_allclose(np.array(image.GetDirection()).reshape(3, 3), np.eye(3), atol=1e-6)


@pytest.mark.parametrize("source", [".nii.gz", ".nrrd", ".mha"])
def test_there_and_back_through_dicom(cli: Callable, ct: Volume, tmp_path: Path, source: str) -> None:
    turned = Volume(ct.array[::-1, :, ::-1], Geometry(ct.geometry.size, ct.geometry.affine @ np.diag([-1.0, 1, -1, 1])))
    write_image(tmp_path / f"ct{source}", turned)
    assert cli("convert", f"ct{source}", "dicom", "--format", "dicom").code == 0
    assert len(list((tmp_path / "dicom").glob("*.dcm"))) == 6
    assert cli("convert", "dicom", f"back{source}").code == 0
    there, back = to_ras(turned), to_ras(read_image(tmp_path / f"back{source}"))
    np.testing.assert_array_equal(back.array, there.array)
    np.testing.assert_allclose(back.geometry.affine, there.geometry.affine, atol=1e-4)


def test_an_archive_becomes_a_data_set(cli: Callable, archive: Path, ct: Volume, tmp_path: Path) -> None:
    result = cli("convert", "archive", "set", "--report", "report.json")
    assert result.code == 1
    assert "1 of 3 CTs failed" in result.message
    assert "missing" in result.message
    manifest = read_manifest(tmp_path / "set" / "data.json")
    assert len(manifest.split("test")) == 2
    arrays = sorted((read_image(case.image).array for case in manifest.cases), key=lambda array: int(array.sum()))
    np.testing.assert_array_equal(arrays[0], ct.array)
    np.testing.assert_array_equal(arrays[1], ct.array + 1)
    entries = json.loads((tmp_path / "set" / "data.json").read_text())["test"]
    assert len({entry["patient"] for entry in entries}) == 2
    assert {row["status"] for row in json.loads((tmp_path / "report.json").read_text())} == {"done", "failed"}


def test_a_zip_is_read_as_it_is(cli: Callable, archive: Path, ct: Volume, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "one.zip", "w") as packed:
        for path in (archive / "patient1").rglob("*.dcm"):
            packed.write(path, path.relative_to(archive))
    assert cli("convert", "one.zip", "ct.nrrd").code == 0
    np.testing.assert_array_equal(read_image(tmp_path / "ct.nrrd").array, ct.array + 1)


def test_a_filled_gap_is_the_mean_of_its_neighbours(cli: Callable, archive: Path, tmp_path: Path) -> None:
    result = cli("convert", "archive/patient2", "ct.nii", "--gaps", "fill", "--json")
    assert result.code == 0
    assert json.loads(result.out)[0]["dicom"]["filled_slices"] == [2]
    array = read_image(tmp_path / "ct.nii").array.astype(float)
    np.testing.assert_allclose(array[:, :, 2], (array[:, :, 1] + array[:, :, 3]) / 2, atol=0.5)


def test_nobody_is_named_unless_asked(cli: Callable, archive: Path, tmp_path: Path) -> None:
    result = cli("convert", "archive", "set", "--report", "report.json", "--gaps", "fill")
    assert result.code == 0
    written = [path for path in (tmp_path / "set").rglob("*") if path.is_file()]
    told = [result.out, result.err, (tmp_path / "report.json").read_text(), *(str(path) for path in written)]
    told.append((tmp_path / "set" / "data.json").read_text())
    headers = [str(nibabel.load(path).header) for path in written if path.name.endswith(".nii.gz")]
    assert len(headers) == 3
    for secret in (PATIENT, "Mustermann", "ID-0", "19640812", *uids(archive)):
        assert not any(secret in text for text in (*told, *headers)), secret


def test_identifiers_are_kept_on_request(cli: Callable, archive: Path, tmp_path: Path) -> None:
    assert cli("convert", "archive", "set", "--keep-identifiers", "--gaps", "fill").code == 0
    names = {path.name.removesuffix(".nii.gz") for path in (tmp_path / "set" / "images").iterdir()}
    assert names == set(uids(archive))
    entries = json.loads((tmp_path / "set" / "data.json").read_text())["test"]
    assert {entry["patient"] for entry in entries} == {"ID-0", "ID-1", "ID-2"}


def test_a_second_run_keeps_what_is_there_and_adds_what_is_new(cli: Callable, archive: Path, tmp_path: Path) -> None:
    assert cli("convert", "archive", "set").code == 1
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set" / "images").iterdir()}
    result = cli("convert", "archive", "set", "--gaps", "fill", "--json")
    assert result.code == 0
    assert sorted(row["status"] for row in json.loads(result.out)) == ["done", "skipped", "skipped"]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert len(read_manifest(tmp_path / "set" / "data.json").cases) == 3


def test_label_maps_stay_label_maps(cli: Callable, ct: Volume, tmp_path: Path) -> None:
    labels = (ct.array > 2000).astype(np.uint8)
    write_labels(tmp_path / "label.nii.gz", labels, ct.geometry)
    assert cli("convert", "--labels", "label.nii.gz", "label.nrrd").code == 0
    image = SimpleITK.ReadImage(str(tmp_path / "label.nrrd"))
    assert image.GetPixelID() == SimpleITK.sitkUInt8
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(image).T, labels)


def test_a_folder_of_images_keeps_its_subfolders(cli: Callable, ct: Volume, tmp_path: Path) -> None:
    for name in ("a/ct", "b/ct"):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        write_image(tmp_path / "in" / f"{name}.nii.gz", ct)
    assert cli("convert", "in", "out", "--format", "mha").code == 0
    assert (tmp_path / "out" / "images" / "a" / "ct.mha").is_file()
    assert (tmp_path / "out" / "images" / "b" / "ct.mha").is_file()
    assert len(read_manifest(tmp_path / "out" / "data.json").cases) == 2


def test_what_is_there_is_not_replaced_unasked(cli: Callable, ct: Volume, tmp_path: Path) -> None:
    write_image(tmp_path / "ct.nii.gz", ct)
    (tmp_path / "ct.nrrd").write_text("mine")
    result = cli("convert", "ct.nii.gz", "ct.nrrd")
    assert (result.code, result.message) == (2, "'ct.nrrd' is there already; --overwrite replaces it")
    assert (tmp_path / "ct.nrrd").read_text() == "mine"
    assert cli("convert", "ct.nii.gz", "ct.nrrd", "--overwrite").code == 0


WRONG = {
    ("convert", "none.nii.gz", "a.nrrd"): "source 'none.nii.gz': no such file or folder",
    ("convert", "ct.nii.gz", "a.nrrd", "--format", "mha"): "--format is for a folder of CTs",
    ("convert", "archive", "a.nrrd"): "one CT series is read",
    ("convert", "archive", "archive/in"): "must not lie in the source",
    ("convert", "archive/patient2", "new/a.nrrd"): "missing slices",
    ("convert", "archive/patient0", "a.nrrd", "--series", "SliceThickness<<3"): "--series",
    ("convert", "text", "set"): "no CT in 'text'",
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.items())
def test_wrong_use_is_one_line_and_leaves_nothing(
    cli: Callable, archive: Path, ct: Volume, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    write_image(tmp_path / "ct.nii.gz", ct)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("no DICOM")
    before = sorted(tmp_path.rglob("*"))
    result = cli(*arguments)
    assert result.code == 2
    assert message in result.message
    assert sorted(tmp_path.rglob("*")) == before
