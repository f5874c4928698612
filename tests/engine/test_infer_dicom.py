"""`infer` on DICOM: the mask is that of the same CT as NIfTI, in every format; archives of many patients."""

import csv
import os
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray

from ctseg.engine.infer import Outcome, infer
from ctseg.engine.model import Model
from ctseg.engine.plan import plan_run
from ctseg.errors import CtsegError
from ctseg.io.dicom.labels import read_labels as read_dicom_labels
from ctseg.io.dicom.read import find_series, read_series, select_series
from ctseg.io.dicom.regions import parse_choice
from ctseg.io.images import read_labels, write_image
from ctseg.jobs import Options, Shard, find_jobs
from ctseg.privacy import KEY_VARIABLE, pseudonym
from ctseg.progress import PlainProgress, Silent
from ctseg.sources.phantom import centered_grid, make_phantom
from ctseg.volume import Volume
from dicom_maker import Plan, write_enhanced, write_series

KEY = "k" * 40
SECRETS = ("Muster", "secret", "19500101", "ACC-99")


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)


@pytest.fixture(scope="session")
def phantom() -> Volume:
    return make_phantom(7, 0, grid=centered_grid((48, 40, 30), (5.0, 5.0, 5.0), "LPS")).image


@pytest.fixture(scope="session")
def plan(phantom: Volume) -> Callable[..., Plan]:
    """A function that gives the plan of a series whose voxels are the phantom's: `plan(tilt_degrees=10)`."""
    origin = np.array(phantom.geometry.origin_mm)

    def hu(points: NDArray[np.float64]) -> NDArray[np.float64]:
        indices = np.rint((points - origin) / 5).astype(int)
        indices = np.clip(indices, 0, np.array(phantom.array.shape) - 1)
        return phantom.array[tuple(np.moveaxis(indices, -1, 0))].astype(float)

    common = {"size": (48, 40, 30), "spacing_mm": (5.0, 5.0, 5.0), "origin_mm": tuple(origin), "hu": hu}
    return lambda **changes: Plan(**{**common, **changes})


@pytest.fixture
def expected(tiny_model: Model, phantom: Volume, tmp_path: Path) -> NDArray[np.uint8]:
    """The mask of the phantom as NIfTI."""
    write_image(tmp_path / "ct.nii.gz", phantom)
    (outcome,) = run(tiny_model, tmp_path / "ct.nii.gz", tmp_path / "nifti-out")
    mask = read_labels(outcome.mask).array
    assert 0 < mask.mean() < 1
    return mask


def run(model: Model, source: Path | list[Path], output: Path, progress=None, **options) -> list[Outcome]:
    chosen = Options(**{k: v for k, v in options.items() if k != "shard"})
    rest = {k: v for k, v in options.items() if k == "shard"}
    jobs = find_jobs(source if isinstance(source, list) else [source], output, chosen)
    return infer(model, jobs, output, progress or Silent(), options=chosen, **rest)


@pytest.mark.parametrize("form", ["folder", "zip", "multi-frame"])
def test_the_mask_is_that_of_the_same_ct_as_nifti(tiny_model, plan, expected, phantom, tmp_path: Path, form) -> None:
    source = (write_enhanced if form == "multi-frame" else write_series)(tmp_path / "ct", plan())
    if form == "zip":
        source = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", source))
    (outcome,) = run(tiny_model, source, tmp_path / "out")
    assert (outcome.status, outcome.mask.suffixes) == ("done", [".nii", ".gz"])
    found = read_labels(outcome.mask)
    np.testing.assert_array_equal(found.array, expected)
    np.testing.assert_allclose(found.geometry.affine, phantom.geometry.affine, atol=1e-4)
    assert outcome.volumes_ml == {"spleen": pytest.approx(int(expected.sum()) * 0.125)}


@pytest.mark.parametrize(("form", "ending"), [("nifti", "_seg.nii.gz"), ("nrrd", "_seg.nrrd"), ("mha", "_seg.mha")])
def test_image_formats(tiny_model, plan, expected, tmp_path: Path, form: str, ending: str) -> None:
    (outcome,) = run(tiny_model, write_series(tmp_path / "ct", plan()), tmp_path / "out", format=form)
    assert outcome.mask.name.endswith(ending)
    np.testing.assert_array_equal(read_labels(outcome.mask).array, expected)


@pytest.mark.parametrize("options", [{}, {"seg_type": "labelmap"}, {"keep_empty_frames": True}], ids=str)
def test_dicom_seg(tiny_model, plan, expected, tmp_path: Path, options) -> None:
    source = write_series(tmp_path / "ct", plan())
    (outcome,) = run(tiny_model, source, tmp_path / "out", format="dicom-seg", **options)
    seg = highdicom.seg.segread(outcome.mask)
    assert seg.segmentation_type.value == options.get("seg_type", "binary").upper()
    slices = 30 if "keep_empty_frames" in options else np.count_nonzero(expected.any(axis=(0, 1)))
    assert seg.NumberOfFrames == slices
    assert int(seg.pixel_array.sum()) == int(expected.sum())
    ct = read_series(select_series(find_series([source]), None))
    found = read_dicom_labels([pydicom.dcmread(outcome.mask)], ct, [parse_choice("1=code:SCT:78961009")])
    np.testing.assert_array_equal(found.labels.array, expected)
    assert seg.segment_numbers == [1]
    assert str(seg.PatientID) == "4711-secret", "a SEG belongs to its patient, or no archive takes it"


def test_rtstruct(tiny_model, plan, expected, tmp_path: Path) -> None:
    source = write_series(tmp_path / "ct", plan())
    (outcome,) = run(tiny_model, source, tmp_path / "out", format="rtstruct")
    assert outcome.mask.name.endswith("_rtstruct.dcm")
    ct = read_series(select_series(find_series([source]), None))
    found = read_dicom_labels([pydicom.dcmread(outcome.mask)], ct, [parse_choice("1=spleen")])
    np.testing.assert_array_equal(found.labels.array, expected)


@pytest.mark.parametrize("form", ["nifti", "dicom-seg", "rtstruct"])
def test_done_masks_are_kept_until_a_slice_is_newer(tiny_model, plan, tmp_path: Path, form: str) -> None:
    source = write_series(tmp_path / "ct", plan())
    states = [run(tiny_model, source, tmp_path / "out", format=form)[0].status for _ in range(2)]
    mask = run(tiny_model, source, tmp_path / "out", format=form)[0].mask
    later = mask.stat().st_mtime_ns + 10**9
    os.utime(sorted(source.iterdir())[7], ns=(later, later))
    states += [run(tiny_model, source, tmp_path / "out", format=form, overwrite=o)[0].status for o in (False, True)]
    assert states == ["done", "skipped", "done", "done"]


def test_names_and_messages_tell_nobody(tiny_model, plan, tmp_path: Path, capsys) -> None:
    source = write_series(tmp_path / "ct", plan(drop=["StudyDate"]))
    write_series(tmp_path / "gaps", plan(missing=[4, 9]))
    outcomes = run(
        tiny_model,
        [source, tmp_path / "gaps"],
        tmp_path / "out",
        PlainProgress(sys.stderr),
        format="dicom-seg",
        overlays=True,
    )
    uid = pydicom.dcmread(next(source.iterdir())).SeriesInstanceUID
    assert outcomes[0].mask.name == f"{pseudonym(uid, KEY.encode(), 'ct-')}_seg.dcm"
    names = " ".join(path.name for path in (tmp_path / "out").iterdir())
    texts = [names, capsys.readouterr().err, str(outcomes), (tmp_path / "out" / "failures.csv").read_text()]
    for secret in (*SECRETS, uid):
        assert not any(secret in text for text in texts)
    (kept,) = run(tiny_model, source, tmp_path / "kept", keep_identifiers=True)
    assert kept.mask.name == f"{uid}_seg.nii.gz"


@pytest.fixture
def archive(plan, tmp_path: Path) -> Path:
    """Three patients in nested folders of a zip: a thick and a thin series, one with a gap, one sound."""
    folder = tmp_path / "archive"
    study = {"StudyInstanceUID": "1.2.3.4.5.1", "FrameOfReferenceUID": "1.2.3.4.5.2"}
    write_series(folder / "p1" / "s" / "thin", plan(tags={**study, "SeriesInstanceUID": "1.2.3.4.5.11"}))
    thick = plan(size=(48, 40, 15), spacing_mm=(5, 5, 10), tags={**study, "SeriesInstanceUID": "1.2.3.4.5.12"})
    write_series(folder / "p1" / "s" / "thick", thick)
    write_series(folder / "p2", plan(missing=[11], tags={"SeriesInstanceUID": "1.2.3.4.5.21"}))
    write_series(folder / "p3", plan(tags={"SeriesInstanceUID": "1.2.3.4.5.31"}))
    localizer = plan(size=(48, 40, 1), tags={"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]})
    write_series(folder / "p3" / "scout", localizer)
    return Path(shutil.make_archive(str(tmp_path / "packed"), "zip", folder))


def test_an_archive_of_many_patients(tiny_model, archive: Path, tmp_path: Path) -> None:
    outcomes = run(tiny_model, archive, tmp_path / "out", keep_identifiers=True)
    uids = {outcome.mask.name.removesuffix("_seg.nii.gz")[10:]: outcome.status for outcome in outcomes}
    assert uids == {"11": "done", "12": "done", "21": "failed", "31": "done"}
    (row,) = csv.DictReader((tmp_path / "out" / "failures.csv").read_text().splitlines())
    assert "missing slices" in row["error"]
    assert row["image"].startswith(f"{archive} #")
    again = run(tiny_model, archive, tmp_path / "out", keep_identifiers=True, gaps="fill")
    assert sorted(outcome.status for outcome in again) == ["done", "skipped", "skipped", "skipped"]
    filled = next(outcome for outcome in again if outcome.status == "done")
    assert any("missing slices" in note for note in filled.notes)
    assert read_labels(filled.mask).array.shape == (48, 40, 30)
    assert not (tmp_path / "out" / "failures.csv").exists()


def test_a_rule_chooses_in_every_study(tiny_model, archive: Path, tmp_path: Path) -> None:
    jobs = find_jobs([archive], tmp_path / "out", Options(series="thinnest", keep_identifiers=True))
    assert sorted(job.mask.name[10:12] for job in jobs) == ["11", "21", "31"]
    jobs = find_jobs([archive], tmp_path / "out", Options(series="SpacingZ > 6", keep_identifiers=True))
    assert [job.mask.name[10:12] for job in jobs] == ["12"]
    with pytest.raises(CtsegError, match="leaves none"):
        find_jobs([archive], tmp_path / "out", Options(series="KVP > 1000"))
    with pytest.raises(CtsegError, match="thinest"):
        find_jobs([archive], tmp_path / "out", Options(series="Slices thinest"))


def test_every_series_is_in_one_shard(tiny_model, archive: Path, tmp_path: Path) -> None:
    done = [
        [outcome.mask for outcome in run(tiny_model, archive, tmp_path / "out", shard=Shard(n, 3))] for n in range(3)
    ]
    assert len({mask for part in done for mask in part}) == sum(map(len, done)) == 4


def test_a_folder_of_both_kinds(tiny_model, plan, phantom: Volume, tmp_path: Path) -> None:
    folder = write_series(tmp_path / "both", plan())
    write_image(folder / "other.nii.gz", phantom)
    write_image(tmp_path / "zzz.nrrd", phantom)
    first, second, third = run(tiny_model, [folder, tmp_path / "zzz.nrrd"], tmp_path / "out")
    assert [first.mask.name, second.mask.name] == ["other_seg.nii.gz", "zzz_seg.nrrd"]
    assert third.mask.name.startswith("ct-")
    np.testing.assert_array_equal(read_labels(first.mask).array, read_labels(third.mask).array)
    with pytest.raises(CtsegError, match=r"--format dicom-seg: refers to the DICOM images of the CT, and '.*other.nii"):
        find_jobs([folder], tmp_path / "out", Options(format="dicom-seg"))


def test_a_series_named_twice_is_done_once(plan, tmp_path: Path) -> None:
    folder = write_series(tmp_path / "in" / "ct", plan())
    jobs = find_jobs([tmp_path / "in", folder, next(folder.iterdir()).parent], tmp_path / "out")
    assert len(jobs) == 1
    zipped = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", folder))
    with pytest.raises(CtsegError, match="lies in parts in several inputs"):
        find_jobs([folder, zipped], tmp_path / "out")


def test_tilt_is_refused_or_undone_on_the_source_slices(tiny_model, plan, tmp_path: Path) -> None:
    source = write_series(tmp_path / "ct", plan(tilt_degrees=10))
    (outcome,) = run(tiny_model, source, tmp_path / "out", format="dicom-seg")
    assert outcome.status == "failed"
    assert "--tilt shear" in outcome.error
    (outcome,) = run(tiny_model, source, tmp_path / "out", format="dicom-seg", tilt="shear")
    assert outcome.status == "done"
    seg = pydicom.dcmread(outcome.mask)
    assert (seg.Columns, seg.Rows) == (48, 40), "the images' own pixels, though the grid has grown"
    positions = {tuple(pydicom.dcmread(path).ImagePositionPatient) for path in source.iterdir()}
    frames = seg.PerFrameFunctionalGroupsSequence
    assert {tuple(frame.PlanePositionSequence[0].ImagePositionPatient) for frame in frames} <= positions


def test_masks_made_with_other_options_do_not_mix(tiny_model, plan, tmp_path: Path) -> None:
    source = write_series(tmp_path / "ct", plan(missing=[11]))
    (outcome,) = run(tiny_model, source, tmp_path / "out", format="dicom-seg", gaps="fill")
    before = outcome.mask.read_bytes()
    for told, options in {
        "gaps fill": {"gaps": "ignore"},
        "seg_type binary": {"gaps": "fill", "seg_type": "labelmap"},
        "keep_empty_frames False": {"gaps": "fill", "keep_empty_frames": True},
    }.items():
        with pytest.raises(CtsegError, match=rf"holds masks made with other options \({told}\); choose another"):
            run(tiny_model, source, tmp_path / "out", **{"format": "dicom-seg", **options})
        assert outcome.mask.read_bytes() == before
    (same,) = run(tiny_model, source, tmp_path / "out", format="dicom-seg", gaps="fill")
    assert same.status == "skipped"
    (other,) = run(
        tiny_model, source, tmp_path / "out", format="dicom-seg", gaps="fill", seg_type="labelmap", overwrite=True
    )
    assert pydicom.dcmread(other.mask).SegmentationType == "LABELMAP"
    (nifti,) = run(tiny_model, source, tmp_path / "out", gaps="fill")
    assert nifti.status == "done", "the type of a SEG is nothing to NIfTI"


def test_one_slice_is_told(tiny_model, plan, tmp_path: Path) -> None:
    (file,) = write_series(tmp_path / "ct", plan(size=(48, 40, 1))).iterdir()
    (outcome,) = run(tiny_model, file, tmp_path / "out")
    assert outcome.status == "failed"
    assert "a single slice is no volume" in outcome.error


def test_a_zip_without_ct_is_told(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("notes.txt", "hello")
    with pytest.raises(CtsegError, match=r"no CT in .*a\.zip; known: DICOM and"):
        find_jobs([tmp_path / "a.zip"], tmp_path / "out")


@pytest.mark.parametrize("gaps", ["error", "fill", "ignore"])
def test_a_series_that_is_no_volume_fails_alone(
    tiny_model: Model, plan: Callable[..., Plan], tmp_path: Path, gaps: str
) -> None:
    """A bolus monitoring: one slice, or many at one place."""
    write_series(tmp_path / "in" / "ct", plan())
    write_series(tmp_path / "in" / "one", plan(size=(48, 40, 1), tags={"SeriesInstanceUID": "1.2.3.4.7"}))
    jobs = find_jobs([tmp_path / "in"], tmp_path / "out", Options(gaps=gaps))
    options = Options(gaps=gaps)
    plans = plan_run(tiny_model, jobs, options, tmp_path, Silent(), max_bytes=10**12)
    assert sorted(bool(one.error) for one in plans.cases) == [False, True]
    outcomes = infer(
        tiny_model, jobs, tmp_path / "out", Silent(), options=options,
        plans={job.mask: one for job, one in zip(jobs, plans.cases, strict=True)},
    )  # fmt: skip
    assert sorted(one.status for one in outcomes) == ["done", "failed"]
    (failed,) = [one for one in outcomes if one.status == "failed"]
    assert "1 slice" in failed.error
    assert "\n" not in failed.error


def test_a_series_that_has_become_longer_is_done_again(
    tiny_model: Model, plan: Callable[..., Plan], tmp_path: Path
) -> None:
    """Its last slices came later, and their files are old."""
    folder = write_series(tmp_path / "in", plan())
    rest = sorted(folder.iterdir())[20:]
    for path in rest:
        path.rename(tmp_path / path.name)
    (first,) = run(tiny_model, folder, tmp_path / "out")
    for path in rest:
        os.utime(tmp_path / path.name, (1, 1))
        (tmp_path / path.name).rename(path)
    (second,) = run(tiny_model, folder, tmp_path / "out")
    assert (first.status, second.status, first.mask) == ("done", "done", second.mask)
    assert read_labels(second.mask).geometry.size == (48, 40, 30)
