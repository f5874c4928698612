"""Facts about files: right, the same for the same voxels, remembered until a file changes."""

import dataclasses
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK

from ctseg.dataset import inspection
from ctseg.dataset.inspection import AIR_HU, TISSUE_HU, CaseFacts, inspect_cases
from ctseg.errors import Stopped
from ctseg.manifest import Case
from ctseg.progress import Silent


def inspect(case: Case, tmp_path: Path) -> CaseFacts:
    return inspect_cases((case,), tmp_path / "facts", Silent())[case.name]


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def test_facts_are_what_another_reader_sees(make_case, tmp_path: Path):
    case = make_case(0)
    facts = inspect(case, tmp_path)
    image, label = SimpleITK.ReadImage(str(case.image)), SimpleITK.ReadImage(str(case.label))
    voxels = SimpleITK.GetArrayFromImage(image)
    assert facts.image.size == facts.label.size == image.GetSize()
    assert facts.image.geometry.spacing_mm == pytest.approx(image.GetSpacing())
    assert facts.image.geometry.origin_mm == pytest.approx(image.GetOrigin())
    assert (facts.image.low, facts.image.high) == (voxels.min(), voxels.max())
    for share, (low, high) in ((facts.image.air_share, AIR_HU), (facts.image.tissue_share, TISSUE_HU)):
        assert share == ((voxels > low) & (voxels < high)).mean()
    assert facts.label.values == tuple(np.unique(SimpleITK.GetArrayFromImage(label))[1:])
    assert facts.image.is_readable
    assert facts.label.is_readable


def copies(case: Case, folder: Path) -> dict[str, Path]:
    """The same CT as other programs would save it again."""
    image = SimpleITK.ReadImage(str(case.image))
    raw = nibabel.load(case.image)
    voxels = np.asarray(raw.dataobj)
    flipped = SimpleITK.DICOMOrient(image, "PIR")
    moved = raw.affine.copy()
    moved[:3, 3] += 40
    paths = {
        "uncompressed": save(folder / "u.nii", voxels, raw.affine),
        "float32": save(folder / "f.nii.gz", voxels.astype(np.float32), raw.affine),
        "float64": save(folder / "d.nii.gz", voxels.astype(np.float64), raw.affine),
        "int32": save(folder / "i.nii.gz", voxels.astype(np.int32), raw.affine),
        "another origin": save(folder / "o.nii.gz", voxels, moved),
    }
    for name, written in (("nrrd", image), ("mha", image), ("turned", flipped)):
        paths[name] = folder / f"{name}.{name if name != 'turned' else 'nii.gz'}"
        SimpleITK.WriteImage(written, str(paths[name]), True)
    return paths


def test_a_copy_has_the_same_digest_however_it_is_saved(make_case, tmp_path: Path):
    case = make_case(0)
    digest = inspect(case, tmp_path).image.digest
    for what, path in copies(case, tmp_path).items():
        assert inspect(dataclasses.replace(case, image=path), tmp_path).image.digest == digest, what


def test_the_least_change_makes_another_digest(make_case, tmp_path: Path):
    case = make_case(0)
    raw = nibabel.load(case.image)
    voxels = np.asarray(raw.dataobj).copy()
    others = [inspect(make_case(1), tmp_path).image.digest, inspect(case, tmp_path).image.digest]
    voxels[3, 2, 1] += 1
    others.append(inspect(dataclasses.replace(case, image=save(tmp_path / "a.nii", voxels)), tmp_path).image.digest)
    half = voxels.astype(np.float32)
    half[3, 2, 1] += 0.5 * np.sign(half[3, 2, 1])  # cut off, it would be the same again
    others.append(inspect(dataclasses.replace(case, image=save(tmp_path / "b.nii", half)), tmp_path).image.digest)
    mirrored = save(tmp_path / "c.nii", np.ascontiguousarray(voxels[::-1]))
    others.append(inspect(dataclasses.replace(case, image=mirrored), tmp_path).image.digest)
    reshaped = save(tmp_path / "d.nii", voxels.reshape(20, 12, 16, order="F"))
    others.append(inspect(dataclasses.replace(case, image=reshaped), tmp_path).image.digest)
    assert len(set(others)) == 6


def test_files_that_cannot_be_read_are_facts_too(make_case, tmp_path: Path):
    case = make_case(0)
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(case.image.read_bytes()[:-100])
    facts = inspect(dataclasses.replace(case, image=broken, label=tmp_path / "none.nii.gz"), tmp_path)
    assert str(broken) in facts.image.error
    assert "truncated" in facts.image.error
    assert facts.label.missing
    assert not facts.image.is_readable
    assert not facts.label.is_readable


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The images that are read from now on."""
    read, seen = inspection.read_image, []
    monkeypatch.setattr(inspection, "read_image", lambda path: seen.append(path) or read(path))
    return seen


def test_what_is_known_is_not_read_again_until_a_file_changes(make_case, tmp_path: Path, reads: list[Path]):
    case = make_case(0)
    first = inspect(case, tmp_path)
    assert inspect(case, tmp_path) == first
    assert len(reads) == 1
    for path in (case.image, case.label):
        status = path.stat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
        assert inspect(case, tmp_path) == first
    assert len(reads) == 3
    case.label.unlink()
    assert inspect(case, tmp_path).label.missing
    assert inspect(dataclasses.replace(case, label=None), tmp_path).label is None
    assert len(reads) == 5


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"source": 1}'])
def test_spoiled_facts_are_read_again(make_case, tmp_path: Path, text: str):
    case = make_case(0)
    first = inspect(case, tmp_path)
    (kept,) = (tmp_path / "facts").iterdir()
    kept.write_text(text)
    assert inspect(case, tmp_path) == first
    source = kept.read_text().partition('"image"')[0]
    kept.write_text(source + '"image": {"size": 3}, "label": null}')
    assert inspect(case, tmp_path) == first


def test_facts_name_neither_patients_nor_files(make_case, tmp_path: Path):
    inspect(make_case(0, patient="Jane Doe"), tmp_path)
    (kept,) = (tmp_path / "facts").iterdir()
    assert "ct_0" not in kept.name + kept.read_text()
    assert "Jane" not in kept.read_text()


def test_a_stop_keeps_what_was_read(make_case, tmp_path: Path, reads: list[Path]):
    cases = tuple(make_case(n) for n in range(4))
    with pytest.raises(Stopped, match="2 of 4 cases are checked; the same command goes on"):
        inspect_cases(cases, tmp_path / "facts", Silent(), lambda: len(reads) >= 2, workers=1)
    assert set(inspect_cases(cases, tmp_path / "facts", Silent())) == {case.name for case in cases}
    assert len(reads) == 4


def test_as_many_at_once_as_wanted_gives_the_same(make_case, tmp_path: Path):
    cases = tuple(make_case(n) for n in range(4))
    alone = inspect_cases(cases, tmp_path / "one", Silent(), workers=1)
    assert inspect_cases(cases, tmp_path / "four", Silent(), workers=4) == alone
