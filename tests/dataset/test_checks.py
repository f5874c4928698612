"""Every check against a made defect, and real CT against all of them."""

import csv
import dataclasses
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from ctseg.dataset.checks import Finding, check_dataset, not_hounsfield, write_findings
from ctseg.dataset.inspection import FileFacts, inspect_cases
from ctseg.io.images import read_image, read_labels, write_labels
from ctseg.manifest import Case, Manifest
from ctseg.progress import Silent
from ctseg.recipe import Recipe, load_recipe
from ctseg.volume import Volume

SPLEEN = load_recipe("spleen:small")


def data_set(*cases: Case) -> Manifest:
    return Manifest(name="set", cases=cases, labels={}, licence="", source="")


def check(tmp_path: Path, *cases: Case, recipe: Recipe = SPLEEN) -> list[Finding]:
    return check_dataset(data_set(*cases), inspect_cases(cases, tmp_path / "facts", Silent()), recipe)


def told(findings: list[Finding]) -> list[tuple[str, str, str | None]]:
    return [(finding.severity, finding.code, finding.case) for finding in findings]


def change_label(case: Case, array=None, affine=None) -> None:
    labels = read_labels(case.label)
    geometry = labels.geometry if affine is None else dataclasses.replace(labels.geometry, affine=affine)
    array = labels.array if array is None else array
    geometry = dataclasses.replace(geometry, size=array.shape)
    write_labels(case.label, np.asfortranarray(array), geometry)


def test_a_sound_data_set_has_no_findings(make_case, tmp_path: Path):
    cases = [make_case(n, split) for n, split in enumerate(("training", "validation", "testing", "test"))]
    bare = dataclasses.replace(cases[3], label=None)
    assert check(tmp_path, *cases[:3], bare) == []


def test_missing_and_unreadable_files_of_all_cases(make_case, tmp_path: Path):
    good, gone, broken, bare = (make_case(n) for n in range(4))
    gone.image.unlink()
    gone.label.unlink()
    broken.image.write_bytes(broken.image.read_bytes()[:-50])
    broken.label.write_bytes(b"")
    findings = check(tmp_path, good, gone, broken, dataclasses.replace(bare, label=None))
    assert told(findings) == [
        ("error", "missing-file", "ct_1"),
        ("error", "missing-file", "ct_1"),
        ("error", "unreadable", "ct_2"),
        ("error", "unreadable", "ct_2"),
        ("error", "no-label", "ct_3"),
    ]
    assert findings[0].text == f"file not found: {gone.image}"
    assert "truncated" in findings[2].text
    assert "the file is empty" in findings[3].text
    assert findings[4].text == "it has no label; add one or move it from training to test"


@pytest.mark.parametrize("bad", [np.nan, np.inf, None])
def test_nan_infinity_and_a_constant_are_told_with_the_readers_reason(make_case, tmp_path: Path, write_ct, bad):
    case = make_case(0)
    image = read_image(case.image)
    array = np.full(image.array.shape, 7.0, np.float32)
    if bad is not None:
        array = image.array.astype(np.float32)
        array[1, 2, 3] = bad
    nibabel.save(nibabel.Nifti1Image(array, image.geometry.affine_ras), case.image)
    (finding,) = check(tmp_path, case)
    assert finding.code == "unreadable"
    assert ("got 1 NaN or infinite" if bad is not None else "every voxel is 7.0") in finding.text


@pytest.mark.parametrize(
    ("shift_voxels", "remedy"),
    [(0.04, None), (0.06, "--fix takes the image's grid"), (0.49, "--fix takes"), (0.51, "export the label again")],
)
def test_a_label_grid_may_differ_by_a_twentieth_voxel(make_case, tmp_path: Path, shift_voxels: float, remedy):
    case = make_case(0)
    affine = read_labels(case.label).geometry.affine.copy()
    affine[1, 3] += 10 * shift_voxels
    change_label(case, affine=affine)
    findings = check(tmp_path, case)
    assert told(findings) == ([] if remedy is None else [("error", "grid", "ct_0")])
    if remedy is not None:
        assert f"corners up to {shift_voxels:g} voxels apart" in findings[0].text
        assert "grid: origin: label (" in findings[0].text
        assert remedy in findings[0].text


def test_what_differs_between_grids_is_named(make_case, tmp_path: Path):
    cut, scaled, turned, mirrored = (make_case(n) for n in range(4))
    change_label(cut, read_labels(cut.label).array[:, :, :-1])
    affine = read_labels(scaled.label).geometry.affine.copy()
    change_label(scaled, affine=affine @ np.diag([1, 1, 1.5, 1]))
    angle = np.deg2rad(5)
    rotation = np.eye(4)
    rotation[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    change_label(turned, affine=affine @ rotation)
    change_label(mirrored, affine=affine @ np.diag([-1, 1, 1, 1]))
    texts = [finding.text for finding in check(tmp_path, cut, scaled, turned, mirrored)]
    start = "the label does not lie on its image's grid: "
    assert texts[0] == f"{start}size: label 20x16x11, image 20x16x12; export the label again, or resample it"
    assert texts[1].startswith(f"{start}spacing: label 10x10x15 mm, image 10x10x10 mm; corners up to 5.5 voxels apart")
    assert texts[2].startswith(f"{start}direction: axes are turned against each other; corners up to ")
    assert texts[3].startswith(f"{start}axes: label LAS, image RAS; corners up to 38 voxels apart; ")


def test_the_smallest_difference_that_counts_is_named_too(make_case, tmp_path: Path):
    case = make_case(0)
    labels = read_labels(case.label)
    angle = 0.06 / np.hypot(19, 15)  # moves the last voxel by a little more than a twentieth
    rotation = np.eye(4)
    rotation[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    change_label(case, affine=labels.geometry.affine @ rotation)
    (finding,) = check(tmp_path, case)
    assert "grid: direction: axes are turned against each other; corners up to 0.0" in finding.text


def test_label_values_must_be_those_of_the_recipe(make_case, tmp_path: Path):
    case = make_case(0)
    labels = read_labels(case.label).array
    change_label(case, labels * 3)
    (finding,) = check(tmp_path, case)[:1]
    assert (finding.severity, finding.code) == ("error", "label-values")
    assert finding.text == (
        "label values 3, but the recipe has 1..1; correct the label or choose a recipe; or set "
        "preprocess.binarize_labels=true"
    )
    assert check(tmp_path, case, recipe=load_recipe("spleen:small", ["preprocess.binarize_labels=true"])) == []
    three = load_recipe("spleen:small", ['labels.2="liver"', 'labels.3="kidney"'])
    assert told(check(tmp_path, case, recipe=three)) == [("warning", "unused-label", None)]
    change_label(case, np.arange(labels.size, dtype=np.uint8).reshape(labels.shape, order="F"))
    assert "label values 4, 5, 6, 7, 8, 9, 10, 11, ..., but" in check(tmp_path, case, recipe=three)[0].text


@pytest.mark.parametrize("value", [0.5, -1.0, 256.0])
def test_a_label_that_is_no_label_map(make_case, tmp_path: Path, value: float):
    case = make_case(0)
    labels = read_labels(case.label)
    array = labels.array.astype(np.float32)
    array[0, 0, 0] = value
    nibabel.save(nibabel.Nifti1Image(array, labels.geometry.affine_ras), case.label)
    assert "labels must be whole numbers in 0..255, got 1 voxels" in check(tmp_path, case)[0].text


def test_empty_labels(make_case, tmp_path: Path):
    empty, full, tested = make_case(0), make_case(1), make_case(2, "testing")
    for case in (empty, tested):
        change_label(case, np.zeros((20, 16, 12), np.uint8))
    findings = check(tmp_path, empty, full, tested)
    assert told(findings) == [("warning", "empty-label", "ct_0"), ("warning", "empty-label", "ct_2")]
    assert "training draws only background from it" in findings[0].text
    assert "its Dice is undefined" in findings[1].text
    alone = check(tmp_path, empty, tested)
    assert ("error", "unused-label", None) in told(alone)
    assert "there is nothing to learn" in alone[0].text


def ct(rng: np.random.Generator) -> np.ndarray:
    """Half air at -1000, a third fat and muscle, some bone: Hounsfield units as in any CT."""
    parts = [(-1000, 500), (-90, 150), (50, 300), (800, 50)]
    return np.concatenate([rng.normal(mean, 20, number) for mean, number in parts]).clip(-1024, 3071)


DEFECTS = {
    "none": (lambda hu: hu, None),
    "padding at -3024": (lambda hu: np.append(hu, [-3024] * 300), None),
    "clipped at 300": (lambda hu: hu.clip(-1000, 300), None),
    "offset": (lambda hu: hu + 1024, "looks like Hounsfield units + 1024, stored without their rescale intercept"),
    "offset and padding": (lambda hu: np.append(hu + 1024, [-2000] * 300), "there is no air"),
    "intercept twice": (lambda hu: hu - 1024, "there is hardly any soft tissue"),
    "8 bit": (lambda hu: ((hu + 1000) / 4).clip(0, 255).astype(np.uint8), "looks like a windowed or normalised"),
    "0..1": (lambda hu: (hu + 1024) / 4095, "looks like a windowed or normalised picture"),
    "standardised": (lambda hu: (hu - hu.mean()) / hu.std(), "looks like a windowed or normalised picture"),
    "abdominal window": (lambda hu: hu.clip(-160, 240), "there is no air"),
    "only air": (lambda hu: hu.clip(-1024, -500), "there is hardly any soft tissue"),
    "no air": (lambda hu: hu[500:], "there is no air (-1100..-200 HU), unless it was cropped to the inside of a body"),
    "linear attenuation": (lambda hu: hu * 0.0192 + 19.2, "looks like a windowed or normalised picture"),
}


@pytest.mark.parametrize(("defect", "reason"), DEFECTS.values(), ids=DEFECTS.keys())
def test_values_that_are_no_hounsfield_units(make_case, tmp_path: Path, defect, reason: str | None):
    case = make_case(0)
    hu = defect(ct(np.random.default_rng(0)))
    array = np.zeros((20, 16, 12), hu.dtype)
    array.reshape(-1)[:] = np.resize(hu, array.size)
    nibabel.save(nibabel.Nifti1Image(array, read_image(case.image).geometry.affine_ras), case.image)
    findings = check(tmp_path, case)
    assert told(findings) == ([] if reason is None else [("warning", "not-hu", "ct_0")])
    if reason is not None:
        assert reason in findings[0].text
        assert findings[0].text.endswith("ctseg needs Hounsfield units: convert it again")


def test_bounds_of_a_picture():
    facts = FileFacts(low=0, high=255, air_share=0.5, tissue_share=0.5)
    assert "values from 0 to 255" in not_hounsfield(facts)
    assert not_hounsfield(dataclasses.replace(facts, high=256)) is None


@pytest.mark.parametrize(
    ("spacing_mm", "likely"), [(0.1, True), (0.09, False), (15, True), (15.1, False), (1000, False)]
)
def test_unlikely_spacings(make_case, tmp_path: Path, spacing_mm: float, likely: bool, write_ct):
    case = make_case(0)
    image, labels = read_image(case.image), read_labels(case.label)
    affine = image.geometry.affine @ np.diag([1, 1, spacing_mm / 10, 1])
    write_ct(case.image, Volume(image.array, dataclasses.replace(image.geometry, affine=affine)))
    write_labels(case.label, labels.array, dataclasses.replace(image.geometry, affine=affine))
    findings = check(tmp_path, case)
    assert told(findings) == ([] if likely else [("warning", "spacing", "ct_0")])
    if not likely:
        assert f"a spacing of 10 x 10 x {spacing_mm:.4g} mm is unlikely for CT (0.1..15 mm)" in findings[0].text


def copy_of(case: Case, name: str, **changes) -> Case:
    """The same voxels in another file, packed otherwise."""
    path = case.image.with_name(f"{name}.nii")
    nibabel.save(nibabel.load(case.image), path)
    return dataclasses.replace(case, name=name, image=path, **changes)


def test_one_image_in_two_splits_is_an_error(make_case, tmp_path: Path):
    case, other = make_case(0), make_case(1, "validation")
    within, across = copy_of(case, "again"), copy_of(case, "leak", split="test", label=None)
    findings = check(tmp_path, case, other, within, across)
    assert told(findings) == [("error", "duplicate", "leak"), ("warning", "duplicate", "again")]
    assert findings[0].text == "the same image as ct_0, which is in training, this in test; remove one"
    assert findings[1].text.startswith("the same image as ct_0, also in training: it counts twice")


def test_one_label_for_two_images_is_a_warning_unless_it_is_empty(make_case, tmp_path: Path):
    first, second = make_case(0), make_case(1)
    second.label.write_bytes(first.label.read_bytes())
    findings = check(tmp_path, first, second)
    assert told(findings) == [("warning", "same-label", "ct_1")]
    assert findings[0].text == "the same label as ct_0, but another image; does one of them belong elsewhere?"
    third = make_case(2)
    for case in (first, second):
        change_label(case, np.zeros((20, 16, 12), np.uint8))
    assert {f.code for f in check(tmp_path, first, second, third)} == {"empty-label"}


def test_a_patient_in_two_splits_is_an_error_that_does_not_name_the_patient(make_case, tmp_path: Path):
    cases = [
        make_case(0, "training", "Jane Doe"),
        make_case(1, "training", "Jane Doe"),
        make_case(2, "test", "Jane Doe"),
    ]
    cases.append(make_case(3, "validation", "John Doe"))
    findings = check(tmp_path, *cases)
    assert told(findings) == [("error", "patient", "ct_2")]
    assert findings[0].text == (
        "the patient of this case in test is also in training (ct_0); move one of them, "
        "or deal all cases out with --split 80/10/10 --resplit"
    )


def test_the_report_is_written_twice(tmp_path: Path):
    findings = [Finding("error", "grid", "a,b", 'a "quoted" reason'), Finding("warning", "unused-label", None, "text")]
    path = write_findings(tmp_path, "checks-spleen", findings)
    assert path == tmp_path / "checks-spleen.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {"severity": "error", "code": "grid", "case": "a,b", "text": 'a "quoted" reason'}
    assert rows[1]["case"] == ""
    assert json.loads((tmp_path / "checks-spleen.json").read_text()) == [dataclasses.asdict(f) for f in findings]


def real_case(folder: Path, image: str, label: str) -> Case:
    return Case(name=Path(image).name, split="training", image=folder / image, label=folder / label)


def test_real_ct_passes(real_data: Path, tmp_path: Path):
    cases = [
        real_case(real_data, "msd_spleen8/imagesTr/spleen_8.nii.gz", "msd_spleen8/labelsTr/spleen_8.nii.gz"),
        *(
            real_case(
                real_data, f"crlm_abdomen/CRLM-CT-{n}_ct.nii.gz", f"crlm_abdomen/CRLM-CT-{n}_spleen_pseudo.nii.gz"
            )
            for n in (1004, 1006)
        ),
        real_case(real_data, "lidc_chest/LIDC-IDRI-0001_ct.nii.gz", "lidc_chest/LIDC-IDRI-0001_lung_pseudo.nii.gz"),
        real_case(real_data, "cip_lung64/ct-64.nrrd", "cip_lung64/wholeLung-64.nrrd"),
    ]
    binary = load_recipe("spleen:small", ["preprocess.binarize_labels=true"])
    assert check(tmp_path, *cases, recipe=binary) == []
    assert check(tmp_path, *cases[:4]) == []


def test_real_lesions_pass_though_they_are_cropped_to_the_body(real_data: Path, tmp_path: Path):
    images = sorted((real_data / "sts_lesion").glob("*_ct.nii.gz"))
    cases = [real_case(real_data, str(path), str(path).replace("_ct.nii", "_lesion.nii")) for path in images]
    assert len(cases) == 12
    assert check(tmp_path, *cases) == []


def test_one_head_in_all_48_axis_orders_is_one_image(real_data: Path, tmp_path: Path):
    paths = sorted((real_data / "nifti_orientations").glob("*.nii.gz"))
    cases = [Case(name=path.name, split="test", image=path, label=None) for path in paths]
    findings = [finding for finding in check(tmp_path, *cases) if finding.code == "duplicate"]
    assert len(cases) == 48
    assert [finding.text.split(",")[0] for finding in findings] == ["the same image as AIL.nii.gz"] * 47
