"""Splits and folds: sizes, patients, determinism, and what is refused."""

import dataclasses
import itertools
import random
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest

from ctseg.dataset.splits import parse_percentages, split_by_percentages, split_into_folds, without_patient
from ctseg.errors import CtsegError, ManifestError
from ctseg.manifest import Case, Manifest


def data_set(sizes: list[int], **more: int) -> Manifest:
    """Patients with so many labelled CTs each, and in other splits (named by `more`) cases of nobody."""
    cases = [
        Case(name=f"p{p}_{n}", split="training", image=Path(f"p{p}_{n}.nii"), label=Path("l.nii"), patient=f"p{p}")
        for p, size in enumerate(sizes)
        for n in range(size)
    ]
    for split, number in more.items():
        cases += [
            Case(name=f"{split}_{n}", split=split, image=Path(f"{split}_{n}.nii"), label=Path("l.nii"))
            for n in range(number)
        ]
    return Manifest(name="set", cases=tuple(cases), labels={}, licence="", source="")


def counts(manifest: Manifest) -> dict[str, int]:
    return dict(Counter(case.split for case in manifest.cases))


def assert_no_patient_is_parted(manifest: Manifest) -> None:
    pairs = {(case.patient, case.split) for case in manifest.cases if case.patient}
    assert len(pairs) == len({patient for patient, _ in pairs})


def split(manifest: Manifest, text: str = "80/10/10", seed: int = 0, again: bool = False) -> Manifest:
    return split_by_percentages(manifest, parse_percentages(text), seed, again)


@pytest.mark.parametrize(
    ("text", "number", "expected"),
    [
        ("80/10/10", 100, {"training": 80, "validation": 10, "testing": 10}),
        ("80/10/10", 41, {"training": 33, "validation": 4, "testing": 4}),
        ("80/20", 41, {"training": 33, "validation": 8}),
        ("80/10/10", 3, {"training": 1, "validation": 1, "testing": 1}),
        ("98/1/1", 10, {"training": 8, "validation": 1, "testing": 1}),
        ("90/0/10", 10, {"training": 9, "testing": 1}),
        ("33.3/33.3/33.4", 9, {"training": 3, "validation": 3, "testing": 3}),
        ("100/0", 4, {"training": 4}),
    ],
)
def test_sizes_are_those_asked_for(text: str, number: int, expected: dict[str, int]):
    assert counts(split(data_set([1] * number), text)) == expected


def test_whole_patients_come_as_near_as_any_choice_of_them_could():
    """Against trying every subset of patients."""
    chance = random.Random(0)
    for seed in range(30):
        sizes = [chance.randint(1, 6) for _ in range(9)]
        manifest = split(data_set(sizes), "80/20", seed)
        assert_no_patient_is_parted(manifest)
        wanted = max(1, int(sum(sizes) * 0.2 + 0.5))
        sums = {sum(part) for n in range(1, 9) for part in itertools.combinations(sizes, n)}
        assert abs(counts(manifest)["validation"] - wanted) == min(abs(total - wanted) for total in sums)


@pytest.mark.parametrize("sizes", [[1, 1, 8], [8, 1, 1], [5, 5, 5], [1, 1, 1, 30], [40, 1, 1]])
@pytest.mark.parametrize("seed", range(5))
def test_every_split_gets_a_patient_however_unequal_they_are(sizes: list[int], seed: int):
    manifest = split(data_set(sizes), "10/45/45", seed)
    assert set(counts(manifest)) == {"training", "validation", "testing"}
    assert_no_patient_is_parted(manifest)


def test_the_same_seed_gives_the_same_split_in_whatever_order_cases_are_listed():
    manifest = data_set([2, 1, 3, 1, 1, 2, 4, 1])
    reordered = dataclasses.replace(manifest, cases=tuple(random.Random(1).sample(manifest.cases, 15)))
    moved = dataclasses.replace(
        manifest, cases=tuple(dataclasses.replace(c, image=Path("/elsewhere") / c.image) for c in manifest.cases)
    )
    first = {case.name: case.split for case in split(manifest).cases}
    assert {case.name: case.split for case in split(reordered).cases} == first
    assert {case.name: case.split for case in split(moved).cases} == first
    assert {case.name: case.split for case in split(manifest, seed=1).cases} != first


def test_chance_does_not_change_with_versions():
    """Published splits must be made again years later."""
    manifest = split(data_set([1] * 10))
    assert [case.name for case in manifest.cases if case.split != "training"] == ["p1_0", "p5_0"]
    first, second = sorted(range(10), key=lambda p: sha256(f"0\0patient\0p{p}".encode()).digest())[:2]
    assert (first, second) == (1, 5)
    assert [manifest.split(name)[0].patient for name in ("testing", "validation")] == ["p1", "p5"]


def test_each_case_is_about_as_often_in_each_split():
    tested = Counter(
        case.name
        for seed in range(300)
        for case in split(data_set([1] * 10), seed=seed).cases
        if case.split == "testing"
    )
    assert len(tested) == 10
    assert all(12 <= number <= 52 for number in tested.values())  # 30 expected, 4 standard deviations of 5.2


def test_cases_without_a_patient_are_patients_of_their_own():
    manifest = data_set([3, 3], training=4)
    assert without_patient(manifest) == 4
    assert counts(split(manifest, "50/50")) == {"training": 5, "validation": 5}
    assert_no_patient_is_parted(split(manifest, "50/50"))


def test_unlabelled_cases_and_what_is_not_named_stay():
    manifest = data_set([1] * 10, testing=3, test=2)
    bare = [dataclasses.replace(c, name=f"bare_{c.name}", patient=None, label=None) for c in manifest.cases[:10]]
    manifest = dataclasses.replace(manifest, cases=(*manifest.cases, *bare))
    after = split(manifest, "50/50")
    assert counts(after) == {"training": 15, "validation": 5, "testing": 3, "test": 2}
    assert [case.name for case in after.cases] == [case.name for case in manifest.cases]
    assert {case.split for case in after.cases[-10:]} == {"training"}


def test_what_is_split_already_is_only_split_again_on_request():
    once = split(data_set([1] * 10))
    with pytest.raises(ManifestError, match="it has cases in validation and testing already; --resplit deals them out"):
        split(once, seed=1)
    with pytest.raises(ManifestError, match="it has cases in validation already"):
        split(once, "80/20", seed=1)
    assert split(once, seed=1, again=True) == split(data_set([1] * 10), seed=1)
    with pytest.raises(ManifestError, match="it has cases in validation already"):
        split_into_folds(once, 3, 1, 0)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("80", "expected TRAINING/VALIDATION/TESTING or TRAINING/VALIDATION, as in 80/10/10"),
        ("80/10/5/5", "expected TRAINING/VALIDATION/TESTING"),
        ("80/10/-10", "expected TRAINING/VALIDATION/TESTING"),
        ("80:20", "expected TRAINING/VALIDATION/TESTING"),
        ("nan/1", "expected TRAINING/VALIDATION/TESTING"),
        ("٨٠/20", "expected TRAINING/VALIDATION/TESTING"),
        ("8/1/1", "percentages must sum to 100, got 10"),
        ("0/50/50", "training cannot be 0 percent"),
    ],
)
def test_wrong_percentages(text: str, problem: str):
    with pytest.raises(CtsegError) as caught:
        parse_percentages(text)
    assert str(caught.value).startswith(f"--split {text}: {problem}")


def test_too_few_patients():
    with pytest.raises(ManifestError, match="'set': 3 splits need as many patients, got 2 with labels"):
        split(data_set([5, 5]))
    with pytest.raises(ManifestError, match="'set': 3 folds need as many patients, got 2"):
        split_into_folds(data_set([5, 5]), 3, 1, 0)
    with pytest.raises(ManifestError, match="'set': no labelled cases to split"):
        split(data_set([], testing=3), "80/20")


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([1] * 41, [9, 8, 8, 8, 8]), ([3, 1, 4, 1, 5, 9, 2, 6], [9, 6, 6, 5, 5]), ([2] * 5, [2] * 5)],
)
def test_every_case_is_in_exactly_one_fold_and_folds_are_alike(sizes: list[int], expected: list[int]):
    manifest = data_set(sizes, testing=2)
    folds = [split_into_folds(manifest, 5, fold, 0) for fold in range(1, 6)]
    in_validation = Counter(case.name for fold in folds for case in fold.validation)
    assert in_validation == {case.name: 1 for case in manifest.split("training")}
    for fold in folds:
        assert_no_patient_is_parted(fold)
        assert counts(fold)["testing"] == 2
    assert sorted((len(fold.validation) for fold in folds), reverse=True) == expected
