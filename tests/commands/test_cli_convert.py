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

import dicom_maker
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


def test_another_ct_of_that_name_is_not_taken_for_what_is_there(cli: Callable, ct: Volume, tmp_path: Path) -> None:
    for name, volume in (("p1", ct), ("p2", Volume(ct.array[:-1], Geometry((11, 10, 6), ct.geometry.affine)))):
        (tmp_path / name).mkdir()
        write_image(tmp_path / name / "ct.nii.gz", volume)
    assert cli("convert", "p1", "set").code == 0
    assert json.loads(cli("convert", "p1", "set", "--json").out)[0]["status"] == "skipped"
    result = cli("convert", "p2", "set")
    assert result.code == 1
    assert (
        "is there and holds another CT (12x10x6 voxels, this one has 11x10x6); choose another output" in result.message
    )
    assert cli("convert", "p2", "set", "--overwrite").code == 0
    assert read_image(tmp_path / "set" / "images" / "ct.nii.gz").geometry.size == (11, 10, 6)


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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("uid", ["../../../PWNED", "../PWNED", "PWNED"])
def test_a_hostile_uid_writes_nothing_outside(cli: Callable, archive: Path, tmp_path: Path, uid: str) -> None:
    for path in (archive / "patient0" / "study").iterdir():
        header = pydicom.dcmread(path)
        header.SeriesInstanceUID = uid
        header.save_as(path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    before = set(tmp_path.rglob("*"))
    assert cli("convert", "archive/patient0", "a/b/set", "--keep-identifiers").code == 0
    (image,) = (tmp_path / "a" / "b" / "set" / "images").iterdir()
    assert image.name.startswith("ct-")
    made = set(tmp_path.rglob("*")) - before
    assert all(path.is_relative_to(tmp_path / "a" / "b" / "set") for path in made)
    assert not any("PWNED" in path.name for path in tmp_path.parent.rglob("*"))


def test_the_manifest_lists_what_earlier_runs_made(cli: Callable, archive: Path, tmp_path: Path) -> None:
    for number in range(2):
        assert cli("convert", f"archive/patient{number}", "set").code == 0
    listed = read_manifest(tmp_path / "set" / "data.json").cases
    assert len({case.image for case in listed}) == 2
    listed[0].image.unlink()
    assert cli("convert", "archive/patient2", "set", "--gaps", "fill").code == 0
    cases = read_manifest(tmp_path / "set" / "data.json").cases
    assert len(cases) == 2
    assert all(case.image.exists() for case in cases)


@pytest.mark.parametrize("text", ['{"name": "x", "training": [], "choices": ["1=liver"]}', "mine", "[]"])
def test_a_manifest_of_someone_else_is_kept(cli: Callable, archive: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "data.json").write_text(text)
    result = cli("convert", "archive", "set", "--overwrite")
    assert result.code == 2
    assert "'set/data.json' was not written by `ctseg convert` and would be replaced" in result.message
    assert [path.read_text() for path in (tmp_path / "set").iterdir()] == [text]


def test_cts_made_in_two_ways_do_not_mix(cli: Callable, archive: Path, tmp_path: Path) -> None:
    assert cli("convert", "archive", "set", "--gaps", "fill").code == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set" / "images").iterdir()}
    for options, told in (
        (["--gaps", "ignore"], "gaps fill"),
        ([], "gaps fill"),
        (["--gaps", "fill", "--keep-identifiers"], "keep_identifiers False"),
    ):
        result = cli("convert", "archive", "set", *options)
        assert result.code == 2
        assert f"holds CTs that were made in another way ({told})" in result.message
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set" / "images").iterdir()} == before
    assert cli("convert", "archive", "set", "--gaps", "ignore", "--overwrite").code == 0
    assert len(read_manifest(tmp_path / "set" / "data.json").cases) == 3


def test_files_that_cannot_be_used_are_told_and_reported(cli: Callable, archive: Path, tmp_path: Path) -> None:
    (archive / "patient0" / "away.dcm").symlink_to(tmp_path)
    for target in ("set", "ct.nii"):
        result = cli("convert", "archive/patient0", target, "--report", f"{target}.json")
        assert result.code == 0
        assert "left out 'archive/patient0" in result.err
        done, left_out = json.loads((tmp_path / f"{target}.json").read_text())
        assert (done["status"], left_out["status"]) == ("done", "left out")
        assert left_out["source"].startswith("archive/patient0")
        assert left_out["error"]


def test_repairs_show_in_the_table(cli: Callable, archive: Path, tmp_path: Path) -> None:
    assert "filled 1 slices" in cli("convert", "archive/patient2", "a.nii", "--gaps", "fill").out
    assert "far end off by 2.5 mm" in cli("convert", "archive/patient2", "b.nii", "--gaps", "ignore").out
    tilted = dicom_maker.write_series(tmp_path / "tilted", dicom_maker.Plan(tilt_degrees=12))
    assert "sheared" in cli("convert", tilted, "c.nii", "--tilt", "shear").out
    plain = cli("convert", "archive/patient0", "d.nii", "--gaps", "ignore", "--tilt", "shear").out
    assert not any(word in plain for word in ("filled", "far end", "sheared"))


def test_dicom_folders_are_replaced_on_request(cli: Callable, ct: Volume, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_image(tmp_path / "in" / "ct.nii.gz", ct)
    shifted = Volume(ct.array + np.int16(1), ct.geometry)
    (tmp_path / "ser").mkdir()
    assert cli("convert", "in/ct.nii.gz", "ser", "--format", "dicom").code == 0, "an empty folder is as good as none"
    assert cli("convert", "in", "set", "--format", "dicom").code == 0
    write_image(tmp_path / "in" / "ct.nii.gz", shifted)
    assert cli("convert", "in/ct.nii.gz", "ser", "--format", "dicom").code == 2
    assert json.loads(cli("convert", "in", "set", "--format", "dicom", "--json").out)[0]["status"] == "skipped"
    for source, target, series in (("in/ct.nii.gz", "ser", "ser"), ("in", "set", "set/images/ct")):
        assert cli("convert", source, target, "--format", "dicom", "--overwrite").code == 0
        assert cli("convert", series, f"{target}.nii").code == 0
        np.testing.assert_array_equal(read_image(tmp_path / f"{target}.nii").array, shifted.array)
        assert len(list((tmp_path / series).iterdir())) == 6
    assert not list(tmp_path.rglob(".*"))


def test_nothing_but_dicom_is_ever_deleted(cli: Callable, ct: Volume, tmp_path: Path) -> None:
    write_image(tmp_path / "ct.nii.gz", ct)
    for name in ("home/thesis.tex", "home/0001.dcm", "deep/a/0001.dcm"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    for target in ("home", "deep"):
        result = cli("convert", "ct.nii.gz", target, "--format", "dicom", "--overwrite")
        assert result.code == 2
        assert "is no folder of nothing but DICOM files" in result.message
    assert (tmp_path / "home" / "thesis.tex").read_text() == (tmp_path / "deep/a/0001.dcm").read_text() == "mine"


WRONG = {
    ("convert", "archive/patient0", "a.nii", "--labels"): "`ctseg labels` makes label maps of SEG and RTSTRUCT",
    ("convert", "archive", "new", "--labels"): "`ctseg labels` makes label maps of SEG and RTSTRUCT",
    ("convert", "ct.nii.gz", "a.mhd"): "target 'a.mhd': '.mhd' is not written; end it in one of .nii.gz",
    ("convert", "archive/patient0", "a.IMG"): "'.img' is not written",
    ("convert", "ct.nii.gz", "a.dcm", "--format", "dicom"): "name a folder (--format dicom for a DICOM series)",
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
