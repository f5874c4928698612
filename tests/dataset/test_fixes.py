"""What --fix mends, what it leaves to people, and that it never touches their files."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from ctseg.dataset.checks import Finding
from ctseg.dataset.fixes import mend
from ctseg.dataset.inspection import inspect_cases
from ctseg.engine.bank import read_case
from ctseg.io.images import read_image, read_labels, write_labels
from ctseg.manifest import Case, Manifest
from ctseg.progress import Silent


def mended(tmp_path: Path, *cases: Case) -> tuple[tuple[Case, ...], list[Finding]]:
    manifest = Manifest(name="set", cases=cases, labels={}, licence="", source="")
    after, findings = mend(manifest, inspect_cases(cases, tmp_path / "facts", Silent()), tmp_path / "fixed")
    return after.cases, findings


def shift_label(case: Case, voxels: float) -> None:
    labels = read_labels(case.label)
    affine = labels.geometry.affine.copy()
    affine[2, 3] += 10 * voxels
    write_labels(case.label, labels.array, dataclasses.replace(labels.geometry, affine=affine))


def test_a_label_that_is_slightly_off_gets_its_images_grid(make_case, tmp_path: Path):
    case = make_case(0)
    shift_label(case, 0.4)
    before, labels = case.label.read_bytes(), read_labels(case.label).array
    (after,), findings = mended(tmp_path, case)
    assert (findings[0].severity, findings[0].code, findings[0].case) == ("fixed", "grid", "ct_0")
    assert case.label.read_bytes() == before
    assert after.label.parent == tmp_path / "fixed"
    image, mask = SimpleITK.ReadImage(str(case.image)), SimpleITK.ReadImage(str(after.label))
    for what in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(mask, what)() == pytest.approx(getattr(image, what)())
    assert np.array_equal(SimpleITK.GetArrayFromImage(mask).T, labels)
    assert np.array_equal(read_case(after)[1].array, labels)


def test_a_mended_label_is_written_once_and_again_when_the_label_changes(make_case, tmp_path: Path):
    case = make_case(0)
    shift_label(case, 0.4)
    (first,), _ = mended(tmp_path, case)
    time = first.label.stat().st_mtime_ns
    (again,), _ = mended(tmp_path, case)
    assert (again.label, again.label.stat().st_mtime_ns) == (first.label, time)
    labels = read_labels(case.label)
    write_labels(case.label, np.asfortranarray(labels.array[::-1]), labels.geometry)
    (other,), _ = mended(tmp_path, case)
    assert other.label != first.label
    assert np.array_equal(read_labels(other.label).array, labels.array[::-1])


def test_what_needs_a_person_is_left_alone(make_case, tmp_path: Path):
    same, close, far, cut, gone = (make_case(n) for n in range(5))
    shift_label(close, 0.04)
    shift_label(far, 0.6)
    labels = read_labels(cut.label)
    write_labels(
        cut.label, np.asfortranarray(labels.array[:-1]), dataclasses.replace(labels.geometry, size=(19, 16, 12))
    )
    gone.label.unlink()
    cases = (same, close, far, cut, gone)
    assert mended(tmp_path, *cases) == (cases, [])
    assert not (tmp_path / "fixed").exists()


def test_a_repeated_case_is_dropped_where_it_says_nothing_new(make_case, tmp_path: Path):
    case = make_case(0, patient="p")
    image = read_image(case.image)
    other_label = tmp_path / "other_label.nii.gz"
    write_labels(other_label, np.zeros(image.array.shape, np.uint8), image.geometry)

    def copy(name: str, **changes) -> Case:
        path = tmp_path / f"{name}.nii.gz"
        path.write_bytes(case.image.read_bytes())
        return dataclasses.replace(case, name=name, image=path, **changes)

    copies = [
        copy("same"),
        copy("other_split", split="testing"),
        copy("other_label", label=other_label),
        copy("no_label", label=None),
        copy("other_patient", patient="q"),
        copy("broken_label", label=tmp_path / "none.nii.gz"),
        copy("same_again"),
    ]
    after, findings = mended(tmp_path, case, *copies)
    assert after == (case, *copies[1:-1])
    assert [(f.severity, f.code, f.case, f.text) for f in findings] == [
        ("fixed", "duplicate", "same", "dropped: the same as ct_0"),
        ("fixed", "duplicate", "same_again", "dropped: the same as ct_0"),
    ]
