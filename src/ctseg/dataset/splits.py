"""Dividing a data set: random splits and folds that keep the CTs of a patient together.

Chance is a hash of the seed and the patient (or, where the list names none, the case): the same data and seed give the
same split wherever the files lie, in whatever order they are listed, and with every version of every library.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections import defaultdict

from ctseg.errors import CtsegError, ManifestError
from ctseg.manifest import Case, Manifest

Groups = list[tuple[Case, ...]]
"""Cases that must not be parted, in the order of chance."""


def parse_percentages(text: str) -> dict[str, float]:
    """Split -> percentage of "80/10/10" (training, validation, testing) or "80/20" (training, validation).

    Raises:
        CtsegError: naming the rule that `text` breaks.
    """
    parts = text.split("/")
    if not 2 <= len(parts) <= 3 or not all(re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,6})?", part) for part in parts):
        raise CtsegError(f"--split {text}: expected TRAINING/VALIDATION/TESTING or TRAINING/VALIDATION, as in 80/10/10")
    values = [float(part) for part in parts]
    if not math.isclose(sum(values), 100, abs_tol=1e-6):
        raise CtsegError(f"--split {text}: percentages must sum to 100, got {sum(values):g}")
    if values[0] == 0:
        raise CtsegError(f"--split {text}: training cannot be 0 percent")
    return dict(zip(("training", "validation", "testing"), values, strict=False))


def split_by_percentages(manifest: Manifest, percentages: dict[str, float], seed: int, again: bool = False) -> Manifest:
    """The manifest with its labelled cases dealt out anew, each split as near to its size as whole patients allow.

    Cases of the splits that `percentages` does not name stay where they are, and so does `test`.

    Args:
        manifest: The data set.
        percentages: Split -> percentage; every split above 0 gets a patient at least.
        seed: Another seed gives another split.
        again: Whether cases that are in `validation` or `testing` may be dealt out anew.

    Raises:
        ManifestError: if there are too few patients, or the data set is split already.
    """
    cases = _cases_to_split(manifest, tuple(percentages), again)
    groups = _groups(cases, seed)
    wanted = [split for split, percentage in percentages.items() if percentage > 0]
    if len(groups) < len(wanted):
        raise ManifestError(
            f"manifest '{manifest.name}': {len(wanted)} splits need as many patients, got {len(groups)} with labels"
        )
    chosen: dict[str, str] = {}
    for left, split in zip(range(len(wanted) - 1, 0, -1), wanted[:0:-1], strict=True):
        number = max(1, math.floor(len(cases) * percentages[split] / 100 + 0.5))
        part = _nearest(groups, number)
        if len(groups) - len(part) < left:  # large patients: the others need one each too
            part = _nearest(groups[:-left], number)
        chosen |= {case.name: split for index in part for case in groups[index]}
        groups = [group for index, group in enumerate(groups) if index not in part]
    return _assigned(manifest, cases, {**{case.name: "training" for case in cases}, **chosen})


def split_into_folds(manifest: Manifest, folds: int, fold: int, seed: int, again: bool = False) -> Manifest:
    """The manifest with one of `folds` equal parts of its labelled cases as `validation`, the others as `training`.

    Every case is in exactly one fold. Cases in `testing` and `test` stay there.

    Args:
        manifest: The data set.
        folds: Number of parts.
        fold: Which one is `validation`, from 1.
        seed: Another seed gives other folds.
        again: Whether cases that are in `validation` may be dealt out anew.

    Raises:
        ManifestError: if there are fewer patients than folds, or the data set is split already.
    """
    cases = _cases_to_split(manifest, ("training", "validation"), again)
    groups = _groups(cases, seed)
    if len(groups) < folds:
        raise ManifestError(f"manifest '{manifest.name}': {folds} folds need as many patients, got {len(groups)}")
    parts: list[list[Case]] = [[] for _ in range(folds)]
    for group in sorted(groups, key=len, reverse=True):
        min(parts, key=len).extend(group)
    validation = {case.name for case in parts[fold - 1]}
    return _assigned(manifest, cases, {c.name: "validation" if c.name in validation else "training" for c in cases})


def without_patient(manifest: Manifest) -> int:
    """How many labelled cases do not say whom they show: each is taken for a patient of its own."""
    return sum(case.patient is None and case.label is not None for case in manifest.cases)


def _cases_to_split(manifest: Manifest, splits: tuple[str, ...], again: bool) -> list[Case]:
    cases = [case for case in manifest.cases if case.split in splits and case.label is not None]
    taken = [split for split in splits if split != "training" and any(case.split == split for case in cases)]
    if taken and not again:
        raise ManifestError(
            f"manifest '{manifest.name}': it has cases in {' and '.join(taken)} already; --resplit deals them out anew"
        )
    if not cases:
        raise ManifestError(f"manifest '{manifest.name}': no labelled cases to split")
    return cases


def _groups(cases: list[Case], seed: int) -> Groups:
    """The cases of each patient, in an order that depends on names and the seed alone."""
    members: dict[tuple[str, str], list[Case]] = defaultdict(list)
    for case in cases:
        members["case" if case.patient is None else "patient", case.patient or case.name].append(case)

    def chance(key: tuple[str, str]) -> str:
        return hashlib.sha256("\0".join((str(seed), *key)).encode("utf-8", "surrogateescape")).hexdigest()

    return [tuple(members[key]) for key in sorted(members, key=chance)]


def _nearest(groups: Groups, number: int) -> set[int]:
    """Indices of groups, preferring early ones, that together come as near to `number` cases as any of them do."""
    before: dict[int, tuple[int, int]] = {}  # sum of cases -> the sum before and the group that made it
    for index, group in enumerate(groups):
        for total in [0, *before]:
            new = total + len(group)
            if new not in before and total < number:
                before[new] = total, index
        if number in before:
            break
    total = min(before, key=lambda found: abs(found - number))
    part = set()
    while total:
        total, index = before[total]
        part.add(index)
    return part


def _assigned(manifest: Manifest, cases: list[Case], splits: dict[str, str]) -> Manifest:
    """The manifest with a new split for each of `cases`."""
    chosen = {case.name for case in cases}
    return dataclasses.replace(
        manifest,
        cases=tuple(
            dataclasses.replace(case, split=splits[case.name]) if case.name in chosen else case
            for case in manifest.cases
        ),
    )
