"""`ctseg labels`: archives of CT with SEG and RTSTRUCT become images, label maps and a manifest."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray

from ctseg import dicom_labels
from ctseg.codes import ANATOMY, Algorithm, Code, Structure, uncoded
from ctseg.io.dicom.read import find_series, read_series
from ctseg.io.dicom.rtstruct import write_rtstruct
from ctseg.io.dicom.seg import write_seg
from ctseg.io.images import read_image, read_labels
from ctseg.manifest import check_files, read_manifest
from ctseg.privacy import KEY_VARIABLE, pseudonym
from dicom_maker import Plan, write_series

KEY = "k" * 40
SECRETS = ("Muster", "4711", "secret", "19500101", "ACC-99", "1.2.3.4")
ALGORITHM = Algorithm(name="x", version="1", model="y")
LIVER = Structure(value=1, name="Liver", category=ANATOMY, type=Code(value="10200004", meaning="Liver"))

Cli = Callable[..., Any]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)


def labels_of(size: tuple[int, int, int], seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 3, size, dtype=np.uint8)


def write_patient(
    folder: Path, number: int, write: Any = write_seg, names: tuple[str, str] = ("Liver", "Spleen")
) -> Any:
    """A CT with one object of two regions; returns (uid, the CT, the labels)."""
    uid = f"1.2.3.4.5.6.{number}"
    tags = {"SeriesInstanceUID": uid, "PatientID": f"4711-{number}", "StudyInstanceUID": f"1.2.3.4.5.7.{number}"}
    write_series(folder / "ct", Plan(tags=tags, axes="oblique" if number % 2 else "axial"))
    ct = read_series(find_series([folder / "ct"]).series[0])
    labels = labels_of(ct.volume.geometry.size, number)
    first = LIVER if names[0] == "Liver" else uncoded(1, names[0])
    (folder / "drawn").mkdir(exist_ok=True)
    write(folder / "drawn" / f"{write.__name__}.dcm", ct, labels, [first, uncoded(2, names[1])], ALGORITHM)
    return uid, ct, labels


@pytest.fixture
def archive(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A zip of three patients, one with SEG, one with RTSTRUCT and other names, one whose CT has a gap."""
    folder = tmp_path / "archive"
    made = {
        "seg": write_patient(folder / "a" / "study", 1),
        "rtstruct": write_patient(folder / "b" / "study", 2, write_rtstruct, ("liver big", "Spleen_2")),
        "gap": write_patient(folder / "c", 3),
    }
    (folder / "c" / "ct" / "slice002.dcm").unlink()
    return Path(shutil.make_archive(str(tmp_path / "packed"), "zip", folder)), made


def test_an_archive_becomes_training_data(cli: Cli, archive: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, made = archive
    result = cli("labels", path, "--output", "data", "--label", "1=/^liver/", "--label", "2=/spleen/")
    assert result.code == 1
    assert "1 of 3 failed" in result.message
    assert "missing slices" in result.message
    manifest = check_files(read_manifest(tmp_path / "data" / "data.json"))
    cases = {case.name: case for case in manifest.split("training")}
    assert manifest.labels == {"0": "background", "1": "^liver", "2": "spleen"}
    entries = json.loads((tmp_path / "data" / "data.json").read_text())["training"]
    for kind in ("seg", "rtstruct"):
        uid, ct, labels = made[kind]
        case = cases.pop(pseudonym(uid, KEY.encode(), "ct-"))
        image, label = read_image(case.image), read_labels(case.label)
        np.testing.assert_array_equal(label.array, labels)
        np.testing.assert_array_equal(image.array, ct.volume.array)
        assert image.geometry.agrees_with(ct.volume.geometry)
        assert label.geometry.agrees_with(ct.volume.geometry)
    assert not cases
    assert len({entry["patient"] for entry in entries}) == 2
    everything = [result.out, result.err, *(p.name for p in (tmp_path / "data").rglob("*"))]
    everything += [(tmp_path / "data" / "data.json").read_text()]
    assert not any(secret in text for secret in SECRETS for text in everything)


def test_what_is_done_is_kept_and_what_failed_is_tried_again(cli: Cli, archive, tmp_path: Path) -> None:
    path, made = archive
    choices = ["--label", "1=/^liver/", "--label", "2=/spleen/", "--output", "data", "--quiet", "--json"]
    first = cli("labels", path, *choices)
    second = cli("labels", path, *choices, "--gaps", "fill")
    assert sorted(row["status"] for row in json.loads(first.out)) == ["done", "done", "failed"]
    assert sorted(row["status"] for row in json.loads(second.out)) == ["done", "skipped", "skipped"]
    assert second.code == 0
    uid, _, labels = made["gap"]
    filled = read_labels(tmp_path / "data" / "labels" / f"{pseudonym(uid, KEY.encode(), 'ct-')}.nii.gz")
    np.testing.assert_array_equal(filled.array, labels), "also where the CT has a gap, and the SEG has not"
    assert len(json.loads((tmp_path / "data" / "data.json").read_text())["training"]) == 3
    other = cli("labels", path, "--label", "1=/spleen/", "--output", "data", "--quiet")
    assert other.code == 2
    assert (
        "'data' holds labels that were made in another way (choices 1=/^liver/, 2=/spleen/; gaps fill)" in other.message
    )


def test_an_object_that_has_changed_is_read_again(cli: Cli, tmp_path: Path) -> None:
    write_patient(tmp_path / "archive", 0)
    arguments = ("labels", "archive", "--output", "set", "--label", "1=/^liver/", "--quiet", "--json")
    assert [row["status"] for row in json.loads(cli(*arguments).out)] == ["done"]
    assert [row["status"] for row in json.loads(cli(*arguments).out)] == ["skipped"]
    for path in (tmp_path / "archive").rglob("*"):
        os.utime(path)
    assert [row["status"] for row in json.loads(cli(*arguments).out)] == ["done"]


def test_names_are_listed_with_counts(cli: Cli, archive) -> None:
    path, _ = archive
    result = cli("labels", path, "--list", "--quiet")
    assert result.code == 0
    rows = [line.split() for line in result.out.splitlines()[2:]]
    assert rows == [
        ["Liver", "SEG", "2", "#1", "SCT:10200004"],
        ["Spleen", "SEG", "2", "#2", "99CTSEG:SPLEEN"],
        ["liver", "big", "RTSTRUCT", "1", "#1"],
        ["Spleen_2", "RTSTRUCT", "1", "#2"],
    ]
    listed = json.loads(cli("labels", path, "--list", "--quiet", "--json").out)
    assert listed[0] == {"name": "Liver", "kind": "SEG", "objects": 2, "codes": ["SCT:10200004"], "numbers": [1]}


def test_a_structure_that_is_lacking(cli: Cli, tmp_path: Path) -> None:
    write_patient(tmp_path / "p", 1)
    result = cli("labels", "p", "--output", "data", "--label", "1=liver", "--label", "2=kidney", "--quiet")
    assert result.code == 1
    assert "series #1: nothing matches 2=kidney; it has #1 'Liver', #2 'Spleen'" in result.message
    assert not (tmp_path / "data" / "data.json").exists()
    options = ["--label", "1=liver", "--label", "2=kidney", "--allow-missing", "--quiet"]
    assert cli("labels", "p", "--output", "data", *options).code == 0


def test_several_objects_of_one_ct(cli: Cli, tmp_path: Path) -> None:
    """A SEG, an RTSTRUCT that says the same, and a SEG of another structure."""
    _, ct, labels = write_patient(tmp_path / "p", 1)
    write_rtstruct(tmp_path / "p" / "drawn" / "rt.dcm", ct, labels, [LIVER, uncoded(2, "Spleen")], ALGORITHM)
    other = np.roll(labels == 2, 1, axis=0).astype(np.uint8)
    write_seg(tmp_path / "p" / "drawn" / "other.dcm", ct, other, [uncoded(1, "Tumour")], ALGORITHM)
    both = cli("labels", "p", "--output", "data", "--label", "1=liver", "--quiet")
    assert both.code == 1
    assert "several objects have regions that match (1 RTSTRUCT, 1 SEG); choose with --only, or --merge" in both.message

    def made(name: str, *options: str) -> NDArray[np.uint8]:
        result = cli("labels", "p", "--output", name, *options, "--quiet")
        assert result.code == 0, result.err
        (label,) = (tmp_path / name / "labels").iterdir()
        return read_labels(label).array

    for only in ("SEG", "rtstruct"):
        np.testing.assert_array_equal(made(only, "--label", "1=liver", "--only", only), labels == 1)
    np.testing.assert_array_equal(made("tumour", "--label", "5=tumour"), other * 5)
    options = ["--label", "1=liver", "--label", "5=tumour", "--merge", "--overlap"]
    np.testing.assert_array_equal(made("first", *options, "first"), np.where(labels == 1, 1, other * 5))
    np.testing.assert_array_equal(made("last", *options, "last"), np.where(other > 0, 5, labels == 1))


def test_references_that_lead_nowhere(cli: Cli, tmp_path: Path) -> None:
    """An object finds its CT by the images it names, by its frame of reference, or not at all."""
    _, _, labels = write_patient(tmp_path / "p", 1)
    (path,) = (tmp_path / "p" / "drawn").iterdir()
    dataset = pydicom.dcmread(path)
    dataset.ReferencedSeriesSequence[0].SeriesInstanceUID = "1.2.3.4.99"
    dataset.save_as(path)
    for step in range(3):
        result = cli("labels", "p", "--output", f"data{step}", "--label", "1=liver", "--quiet")
        if step < 2:
            (label,) = (tmp_path / f"data{step}" / "labels").iterdir()
            np.testing.assert_array_equal(read_labels(label).array, labels == 1)
        if step == 0:
            del dataset.ReferencedSeriesSequence, dataset.SourceImageSequence
        if step == 1:
            dataset.FrameOfReferenceUID = "1.2.3.4.98"
        dataset.save_as(path)
    assert result.code == 1
    assert "the CT that it refers to is not here; add its folder" in result.message


def test_two_cts_of_one_frame_are_told_apart_or_refused(cli: Cli, tmp_path: Path) -> None:
    tags = {"FrameOfReferenceUID": "1.2.3.4.5.8", "StudyInstanceUID": "1.2.3.4.5.9"}
    for name in ("one", "two"):
        write_series(tmp_path / "p" / name, Plan(tags=tags))
    found = find_series([tmp_path / "p"])
    ct = read_series(found.series[1])
    labels = labels_of(ct.volume.geometry.size, 5)
    write_seg(tmp_path / "p" / "seg.dcm", ct, labels, [LIVER, uncoded(2, "Spleen")], ALGORITHM)
    rows = json.loads(cli("labels", "p", "--output", "data", "--label", "1=liver", "--quiet", "--json").out)
    assert [(row["source"], row["status"]) for row in rows] == [("series #2", "done")]
    dataset = pydicom.dcmread(tmp_path / "p" / "seg.dcm")
    del dataset.ReferencedSeriesSequence, dataset.SourceImageSequence
    dataset.save_as(tmp_path / "p" / "seg.dcm")
    result = cli("labels", "p", "--output", "data2", "--label", "1=liver", "--quiet")
    assert "2 CT series fit what it refers to" in result.message


CHOICES = ["--output", "data", "--quiet", "--gaps", "fill", "--label"]


def test_after_an_interrupted_run_no_other_choices_mix_in(cli: Cli, archive, tmp_path: Path, monkeypatch) -> None:
    path, _ = archive
    write, written = dicom_labels.write_labels, []

    def cut_off(*arguments: Any) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(arguments)
        write(*arguments)

    monkeypatch.setattr(dicom_labels, "write_labels", cut_off)
    with contextlib.suppress(KeyboardInterrupt):
        cli("labels", path, *CHOICES, "1=/^liver/")
    monkeypatch.undo()
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    (label,) = (tmp_path / "data" / "labels").iterdir()
    before = label.read_bytes()
    other = cli("labels", path, *CHOICES, "1=/spleen/")
    assert other.code == 2
    assert "holds labels that were made in another way (choices 1=/^liver/)" in other.message
    assert label.read_bytes() == before
    rows = json.loads(cli("labels", path, *CHOICES, "1=/^liver/", "--json").out)
    assert sorted(row["status"] for row in rows) == ["done", "done", "skipped"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--gaps", "ignore"], "gaps fill"),
        (["--gaps", "fill", "--keep-identifiers"], "keep_identifiers False"),
        (["--gaps", "fill", "--label", "2=/spleen/"], "choices 1=/^liver/"),
    ],
)
def test_labels_made_in_two_ways_do_not_mix(cli: Cli, archive, options: list[str], told: str) -> None:
    path, _ = archive
    assert cli("labels", path, *CHOICES, "1=/^liver/").code == 0
    result = cli("labels", path, "--output", "data", "--label", "1=/^liver/", "--quiet", *options)
    assert result.code == 2
    assert f"made in another way ({told})" in result.message


def test_labels_of_unknown_origin_are_not_taken_for_ours(cli: Cli, archive, tmp_path: Path) -> None:
    path, _ = archive
    assert cli("labels", path, *CHOICES, "1=/^liver/").code == 0
    (tmp_path / "data" / "ctseg_labels.json").unlink()
    result = cli("labels", path, *CHOICES, "1=/^liver/")
    assert result.code == 2
    assert "of unknown origin" in result.message


def test_other_choices_replace_all_labels_or_none(cli: Cli, archive, tmp_path: Path) -> None:
    path, made = archive
    assert cli("labels", path, *CHOICES, "1=/^liver/").code == 0
    write_patient(tmp_path / "p", 1)
    result = cli("labels", "p", *CHOICES, "1=/spleen/", "--overwrite")
    assert result.code == 2
    assert "holds 2 labels made in another way that would stay" in result.message
    assert cli("labels", path, *CHOICES, "1=/spleen/", "--overwrite").code == 0
    for uid, _, labels in made.values():
        label = read_labels(tmp_path / "data" / "labels" / f"{pseudonym(uid, KEY.encode(), 'ct-')}.nii.gz")
        np.testing.assert_array_equal(label.array, labels == 2)


def test_the_manifest_lists_what_earlier_runs_made(cli: Cli, tmp_path: Path) -> None:
    for number in (1, 2):
        write_patient(tmp_path / f"p{number}", number)
        assert cli("labels", f"p{number}", "--output", "data", "--label", "1=liver", "--quiet").code == 0
    assert len(check_files(read_manifest(tmp_path / "data" / "data.json")).split("training")) == 2


def test_a_manifest_of_someone_else_is_kept(cli: Cli, tmp_path: Path) -> None:
    write_patient(tmp_path / "p", 1)
    assert cli("convert", "p", "data", "--quiet").code == 0
    before = (tmp_path / "data" / "data.json").read_bytes()
    result = cli("labels", "p", "--output", "data", "--label", "1=liver", "--quiet", "--overwrite")
    assert result.code == 2
    assert "was not written by `ctseg labels`" in result.message
    assert (tmp_path / "data" / "data.json").read_bytes() == before


def test_files_that_cannot_be_used_are_told(cli: Cli, tmp_path: Path) -> None:
    write_patient(tmp_path / "p", 1)
    (tmp_path / "p" / "away.dcm").symlink_to(tmp_path)
    assert "left out 'p" in cli("labels", "p", "--output", "data", "--label", "1=liver").err
    assert "left out 'p" in cli("labels", "p", "--list").err


def test_identifiers_on_request(cli: Cli, tmp_path: Path) -> None:
    uid, _, _ = write_patient(tmp_path / "p", 1)
    assert cli("labels", "p", "--output", "data", "--label", "1=liver", "--quiet", "--keep-identifiers").code == 0
    (entry,) = json.loads((tmp_path / "data" / "data.json").read_text())["training"]
    assert entry == {"image": f"images/{uid}.nii.gz", "label": f"labels/{uid}.nii.gz", "patient": "4711-1"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none", "--list"], "source 'none': no such file or folder"),
        (["empty", "--list"], "no SEG or RTSTRUCT in empty; `ctseg dicom ls` lists what there is"),
        (["empty"], "--output and at least one --label are needed; --list shows which names there are"),
        (["empty", "--output", "x"], "--output and at least one --label are needed"),
        (["empty", "--output", "x", "--label", "liver"], "--label liver: expected VALUE=PATTERN"),
        (["empty", "--output", "x", "--label", "1=liver", "--only", "SEG"], "no SEG in empty"),
    ],
)
def test_wrong_use(cli: Cli, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    result = cli("labels", *arguments, "--quiet")
    assert (result.code, result.out) == (2, "")
    assert message in result.message
    assert not (tmp_path / "x").exists()


def test_a_real_archive(cli: Cli, real_data: Path, tmp_path: Path) -> None:
    source = real_data / "sts_lesion" / "STS_001_dicom_rtstruct.zip"
    assert cli("labels", source, "--output", "data", "--label", "1=GTV_Mass_CT", "--quiet").code == 0
    (label,) = (tmp_path / "data" / "labels").iterdir()
    published = read_labels(real_data / "sts_lesion" / "STS_001_lesion.nii.gz")
    np.testing.assert_array_equal(read_labels(label).array, published.array)
