"""`ctseg dicom ls`: what a person and a script see of folders and archives, and what they do not see."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ctseg.privacy import KEY_VARIABLE, pseudonym
from dicom_maker import Plan, write_enhanced, write_series

SECRETS = ("Muster", "secret", "19500101", "ACC-99")


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "k" * 40)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A sound series, one with a gap and a tilt, a localizer, an RTSTRUCT, a broken file and a text."""
    folder = tmp_path / "study"
    write_series(folder / "a", Plan(tags={"SeriesDescription": "Portal \x1b[31mvenous", "SeriesNumber": 1}))
    write_series(folder / "b", Plan(missing=[2], tilt_degrees=12, tags={"SeriesNumber": 2, "ContrastBolusAgent": "X"}))
    write_series(folder / "c", Plan(size=(9, 7, 1), tags={"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}))
    structures = Plan(size=(9, 7, 1), drop=["PixelData", "Rows"], tags={"Modality": "RTSTRUCT"})
    write_series(folder / "d", structures)
    broken = write_series(tmp_path / "whole", Plan(size=(9, 7, 1))) / "slice000.dcm"
    (folder / "broken").write_bytes(broken.read_bytes()[:900])
    (folder / "notes.txt").write_text("hello")
    return folder


def test_people_see_a_row_per_series_and_every_finding(cli: Callable[..., Any], study: Path):
    result = cli("dicom", "ls", study, "--quiet")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[2].split()[:6] == ["#1", "CT", "Portal", "?[31mvenous", "6", "9x7"]
    assert "axial, tilt 12.0" in lines[3]
    assert lines[3].endswith("gaps tilt")
    assert lines[4].split()[:2] == ["#3", "localizer"]
    assert any(line.startswith("#2 gaps: missing slices of 2.50 mm: 1 (1 between") for line in lines)
    assert any(line.startswith("#2 tilt: slices drift by") for line in lines)
    assert "other objects: 1 x RTSTRUCT" in lines
    assert "1 files cannot be used:" in lines


def test_scripts_get_the_same_as_json(cli: Callable[..., Any], study: Path):
    data = json.loads(cli("dicom", "ls", study, "--json", "--quiet").out)
    assert [row["number"] for row in data["series"]] == [1, 2, 3]
    first, second, _ = data["series"]
    assert first["spacing_mm"] == [0.75, 1.25, 2.5]
    assert (first["orientation"], first["kernel"], first["kvp"], first["slices"]) == ("axial", "B30f", 120.0, 6)
    assert (first["contrast"], second["contrast"]) == (False, True)
    assert (first["problems"], [problem["code"] for problem in second["problems"]]) == ([], ["gaps", "tilt"])
    assert [other["kind"] for other in data["others"]] == ["RTSTRUCT"]
    assert data["not_dicom"] == 1
    assert len(data["rejected"]) == 1


def test_a_rule_leaves_some(cli: Callable[..., Any], study: Path):
    data = json.loads(cli("dicom", "ls", study, "--json", "--quiet", "--series", "portal").out)
    assert [row["number"] for row in data["series"]] == [1]
    none = cli("dicom", "ls", study, "--quiet", "--series", "KVP>200")
    assert (none.code, none.out) == (2, "")
    assert none.message.startswith("no series passes --series 'KVP>200'; there are:\n  series #1 'Portal")


def test_no_identifier_is_shown_unless_asked_for(cli: Callable[..., Any], study: Path):
    hidden = cli("dicom", "ls", study).out + cli("dicom", "ls", study).err + cli("dicom", "ls", study, "--json").out
    shown = json.loads(cli("dicom", "ls", study, "--json", "--quiet", "--keep-identifiers").out)["series"][0]
    for secret in (*SECRETS, shown["series_uid"], shown["study_uid"]):
        assert secret not in hidden
    assert shown["patient_id"] == "4711-secret"
    assert shown["name"] == pseudonym(shown["series_uid"], b"k" * 40)
    assert shown["series_uid"] in cli("dicom", "ls", study, "--keep-identifiers").out


def test_an_archive_and_a_multi_frame_file(cli: Callable[..., Any], study: Path, tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        for path in (study / "a").iterdir():
            archive.write(path, f"deep/er/{path.name}")
    enhanced = write_enhanced(tmp_path / "e.dcm", Plan())
    result = cli("dicom", "ls", tmp_path / "s.zip", enhanced, "--json", "--quiet")
    assert [row["slices"] for row in json.loads(result.out)["series"]] == [6, 6]


@pytest.mark.parametrize("name", ["empty", "text", "nowhere"])
def test_no_dicom_is_an_error(cli: Callable[..., Any], tmp_path: Path, name: str):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello")
    result = cli("dicom", "ls", name)
    expected = "cannot read 'nowhere': no such file" if name == "nowhere" else f"no DICOM in '{name}': name the folder"
    assert (result.code, result.out) == (2, "")
    assert result.message.startswith(expected)


def test_only_broken_files_are_told_with_their_reasons(cli: Callable[..., Any], study: Path):
    result = cli("dicom", "ls", study / "broken")
    assert result.code == 2
    assert "an image without pixels: cut short" in result.message


def test_names_of_files_are_told_only_to_who_keeps_identifiers(cli: Callable[..., Any], study: Path):
    inner = study / "Muster^Maria"
    (study / "d").rename(inner)
    (study / "broken").rename(inner / "broken")
    hidden = cli("dicom", "ls", study, "--json", "--quiet").out + cli("dicom", "ls", study, "--quiet").out
    assert "Muster" not in hidden
    assert "broken" not in json.loads(cli("dicom", "ls", study, "--json", "--quiet").out)["rejected"][0]["file"]
    kept = json.loads(cli("dicom", "ls", study, "--json", "--quiet", "--keep-identifiers").out)
    assert kept["rejected"][0]["file"] == str(inner / "broken")
    assert kept["others"][0]["file"] == str(inner / "slice000.dcm")
    names = [Path(name).name for row in kept["series"][:1] for name in row["files"].values()]
    assert names == [f"slice{n:03}.dcm" for n in range(6)]
    assert str(inner / "broken") in cli("dicom", "ls", study, "--quiet", "--keep-identifiers").out
