"""Inspecting, mending, splitting and checking in one: what is written, and when."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest

from ctseg.dataset.curate import Curated, Wishes, curate
from ctseg.dataset.splits import split_by_percentages
from ctseg.errors import ManifestError
from ctseg.io.images import read_labels, write_labels
from ctseg.manifest import Case, Manifest, check_files, read_manifest
from ctseg.progress import Silent
from ctseg.recipe import Recipe
from ctseg.workspace import manifest_to_dict

HALVES = partial(split_by_percentages, percentages={"training": 50, "validation": 50}, seed=0)


def curated(tmp_path: Path, recipe: Recipe, cases: list[Case], **wishes) -> Curated:
    manifest = Manifest(name="set", cases=tuple(cases), labels={"1": "spleen"}, licence="mine", source="here")
    return curate(manifest, recipe, tmp_path / "prepared", Wishes(**wishes), Silent())


def repeat(case: Case, name: str) -> Case:
    path = case.image.with_name(f"{name}.nii.gz")
    path.write_bytes(case.image.read_bytes())
    return dataclasses.replace(case, name=name, image=path)


def test_a_list_is_written_that_reads_back_from_anywhere(make_case, tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cases = [make_case(n, patient=f"p{n // 2}") for n in range(4)]
    relative = [dataclasses.replace(c, image=Path(c.image.name), label=Path(c.label.name)) for c in cases]
    result = curated(
        Path(), tiny_recipe, relative, divide=HALVES, division="split 50/50, seed 0", list_file=Path("new/list.json")
    )
    assert result.findings == []
    monkeypatch.chdir("/")
    again = check_files(read_manifest(tmp_path / "new" / "list.json"))
    assert {(c.name, c.split, c.patient) for c in again.cases} == {
        (c.name, c.split, c.patient) for c in result.manifest.cases
    }
    assert {c.image for c in again.cases} == {c.image for c in cases}
    assert (again.name, again.labels, again.licence) == ("set", {"1": "spleen"}, "mine")
    assert len(again.validation) == 2
    content = json.loads((tmp_path / "new" / "list.json").read_text())
    assert (content["division"], content["fixes"]) == ("split 50/50, seed 0", [])


def test_a_patient_survives_being_written(tmp_path: Path):
    (tmp_path / "a.json").write_text('{"training": [{"image": "a.nii", "patient": "P 1", "weight": 2.0}, "b.nii"]}')
    first = read_manifest(tmp_path / "a.json")
    (tmp_path / "b.json").write_text(json.dumps(manifest_to_dict(first)))
    assert read_manifest(tmp_path / "b.json") == first


def test_repeated_cases_are_dropped_before_they_are_dealt_out(make_case, tiny_recipe, tmp_path: Path):
    cases = [make_case(n) for n in range(2)]
    cases += [repeat(case, f"{case.name}_again") for case in cases]
    for seed in range(4):
        result = curated(tmp_path, tiny_recipe, cases, divide=partial(HALVES, seed=seed), fix=True)
        assert result.errors == []
        assert [len(result.manifest.split(name)) for name in ("training", "validation")] == [1, 1]
    leaks = [curated(tmp_path, tiny_recipe, cases, divide=partial(HALVES, seed=seed)).errors for seed in range(4)]
    assert any(leaks)
    assert {error.code for errors in leaks for error in errors} == {"duplicate"}


def test_errors_keep_the_list_from_being_written_but_not_the_report(make_case, tiny_recipe, tmp_path: Path):
    case = make_case(0)
    case.label.unlink()
    result = curated(tmp_path, tiny_recipe, [case, make_case(1)], list_file=tmp_path / "list.json")
    assert [error.code for error in result.errors] == ["missing-file"]
    assert result.list_file is None
    assert not (tmp_path / "list.json").exists()
    assert result.report == tmp_path / "prepared" / "checks-spleen-small.csv"
    assert "missing-file" in result.report.read_text()


def test_a_mended_data_set_is_checked_and_listed_as_mended(make_case, tiny_recipe, tmp_path: Path):
    case = make_case(0)
    labels = read_labels(case.label)
    affine = labels.geometry.affine.copy()
    affine[0, 3] += 3
    write_labels(case.label, labels.array, dataclasses.replace(labels.geometry, affine=affine))
    assert [error.code for error in curated(tmp_path, tiny_recipe, [case]).errors] == ["grid"]
    result = curated(tmp_path, tiny_recipe, [case], fix=True, list_file=tmp_path / "list.json")
    assert result.errors == []
    (listed,) = read_manifest(tmp_path / "list.json").cases
    assert listed.label == result.manifest.cases[0].label
    assert listed.label.parent == tmp_path / "prepared" / "fixed"
    assert json.loads((tmp_path / "list.json").read_text())["fixes"] == [
        f"ct_0: the label's copy in '{listed.label}' has the image's grid"
    ]


def test_missing_patients_are_told_once_and_only_when_they_matter(make_case, tiny_recipe, tmp_path: Path):
    cases = [make_case(0), make_case(1), make_case(2, patient="p")]
    assert curated(tmp_path, tiny_recipe, cases).findings == []
    (finding,) = curated(tmp_path, tiny_recipe, cases, divide=HALVES).findings
    assert (finding.severity, finding.code, finding.case) == ("warning", "no-patient", None)
    assert finding.text == "2 labelled cases name no patient; each was taken for a patient of its own"


def test_a_split_that_cannot_be_is_told_before_anything_is_read(make_case, tiny_recipe, tmp_path: Path):
    with pytest.raises(ManifestError, match="2 splits need as many patients"):
        curated(tmp_path, tiny_recipe, [make_case(0)], divide=HALVES)
    assert not (tmp_path / "prepared").exists()
