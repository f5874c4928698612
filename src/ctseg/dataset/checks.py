"""What is wrong with a data set: every problem of every case at once, from facts about its files.

An error keeps a data set from being trained on, or spoils what is measured on it. A warning is for a person to look at.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ctseg.dataset.inspection import AIR_HU, TISSUE_HU, CaseFacts, FileFacts
from ctseg.errors import ImageError
from ctseg.files import write_csv, write_json
from ctseg.manifest import Case, Manifest
from ctseg.recipe import Recipe
from ctseg.volume import GEOMETRY_TOLERANCE_VOXELS, Geometry

Severity = Literal["error", "warning", "fixed"]

MENDABLE_VOXELS = 0.5
"""A label of its image's size whose corners lie no further off is taken to lie on the image's grid by `--fix`."""
MIN_HU_RANGE = 256
"""From the lowest to the highest value of a CT there are far more Hounsfield units; a picture has at most so many."""
OFFSET_HU = 1024
"""What scanners add so that stored values are not negative; a rescale intercept takes it away again."""
MIN_AIR_SHARE = 1e-4
"""Around and inside any body there is more air than this."""
MIN_TISSUE_SHARE = 0.02
"""Any part of a body that is scanned has more soft tissue than this, however large the field of view."""
SPACING_MM = (0.1, 15.0)
"""Voxels of CT are neither smaller nor larger."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or was until it was mended.

    Attributes:
        severity: See Severity.
        code: The same word for the same kind of problem.
        case: The name of the case; None where it is about the whole data set.
        text: What is wrong and what to do.
    """

    severity: Severity
    code: str
    case: str | None
    text: str


def check_dataset(manifest: Manifest, facts: Mapping[str, CaseFacts], recipe: Recipe) -> list[Finding]:
    """All findings, errors first, else in the order of the cases.

    Args:
        manifest: The data set, as it is split.
        facts: Of every case, by its name.
        recipe: Whose labels and rules the data set must obey.
    """
    findings = [
        finding
        for case in manifest.cases
        for check in (_files, _grid, _label_values, _hounsfield, _spacing, _network_grid)
        for finding in check(case, facts[case.name], recipe)
    ]
    for check_all in (_duplicates, _equal_labels, _patients, _unused_labels):
        findings += check_all(manifest, facts, recipe)
    return sorted(findings, key=lambda finding: finding.severity != "error")


def write_findings(folder: Path, name: str, findings: list[Finding]) -> Path:
    """Writes the findings as `NAME.csv` and `NAME.json` into `folder`; the path of the first."""
    rows = [dataclasses.asdict(finding) for finding in findings]
    write_json(folder / f"{name}.json", rows)
    write_csv(folder / f"{name}.csv", [field.name for field in dataclasses.fields(Finding)], rows)
    return folder / f"{name}.csv"


def is_same_grid(facts: CaseFacts) -> bool:
    """True where image and label can be read and lie on one grid."""
    image, label = facts.image, facts.label
    if label is None or not image.is_readable or not label.is_readable:
        return False
    return image.geometry.agrees_with(label.geometry)


def is_mendable(facts: CaseFacts) -> bool:
    """True where the label's grid differs from the image's by so little that it can only be the same one."""
    image, label = facts.image, facts.label
    if label is None or not image.is_readable or not label.is_readable or image.size != label.size:
        return False
    apart = image.geometry.corner_distance_voxels(label.geometry)
    return GEOMETRY_TOLERANCE_VOXELS < apart <= MENDABLE_VOXELS


def _files(case: Case, facts: CaseFacts, _: Recipe) -> Iterator[Finding]:
    if case.label is None and case.split != "test":
        yield Finding("error", "no-label", case.name, f"it has no label; add one or move it from {case.split} to test")
    for path, file in ((case.image, facts.image), (case.label, facts.label)):
        if file is not None and file.missing:
            yield Finding("error", "missing-file", case.name, f"file not found: {path}")
        elif file is not None and file.error:
            yield Finding("error", "unreadable", case.name, file.error)


def _grid(case: Case, facts: CaseFacts, _: Recipe) -> Iterator[Finding]:
    label = facts.label
    if label is None or not (facts.image.is_readable and label.is_readable) or is_same_grid(facts):
        return
    text = f"the label does not lie on its image's grid: {_differences(facts.image.geometry, label.geometry)}"
    if facts.image.size == label.size:
        text += f"; corners up to {facts.image.geometry.corner_distance_voxels(label.geometry):.3g} voxels apart"
    remedy = "--fix takes the image's grid" if is_mendable(facts) else "export the label again, or resample it"
    yield Finding("error", "grid", case.name, f"{text}; {remedy}")


def _differences(image: Geometry, label: Geometry) -> str:
    """What differs between two grids, as "label A, image B" for each of size, spacing, origin and axes."""

    def numbers(values: tuple[float, ...], separator: str) -> str:
        return separator.join(f"{value:.6g}" for value in values)

    told = {
        "size": [numbers(g.size, "x") for g in (label, image)],
        "spacing": [numbers(g.spacing_mm, "x") + " mm" for g in (label, image)],
        "origin": [f"({numbers(g.origin_mm, ', ')}) mm" for g in (label, image)],
        "axes": [g.axis_codes for g in (label, image)],
    }
    differing = [f"{what}: label {a}, image {b}" for what, (a, b) in told.items() if a != b]
    if image.axis_codes == label.axis_codes and not np.allclose(image.direction, label.direction, atol=1e-5):
        differing.append("direction: axes are turned against each other")
    return "; ".join(differing)


def _label_values(case: Case, facts: CaseFacts, recipe: Recipe) -> Iterator[Finding]:
    if facts.label is None or not facts.label.is_readable:
        return
    values, known = facts.label.values, len(recipe.labels)
    if recipe.clicks is not None:  # every value is an organ of its own
        known = 255
    unknown = [value for value in values if value > known]
    if unknown and not recipe.preprocess.binarize_labels:
        listed = ", ".join(map(str, unknown[:8])) + (", ..." if len(unknown) > 8 else "")
        remedy = "; or set preprocess.binarize_labels=true" if known == 1 else ""
        text = f"label values {listed}, but the recipe has 1..{known}; correct the label or choose a recipe{remedy}"
        yield Finding("error", "label-values", case.name, text)
    if not values:
        use = "training draws only background from it" if case.split == "training" else "its Dice is undefined"
        yield Finding("warning", "empty-label", case.name, f"the label is empty: {use}; is that right?")


def _hounsfield(case: Case, facts: CaseFacts, _: Recipe) -> Iterator[Finding]:
    image = facts.image
    if image.is_readable and (text := not_hounsfield(image)):
        yield Finding("warning", "not-hu", case.name, f"{text}; ctseg needs Hounsfield units: convert it again")


def not_hounsfield(image: FileFacts) -> str | None:
    """Why the values of a CT cannot be Hounsfield units, or None if they may be."""
    bounds = f"values from {image.low:.6g} to {image.high:.6g}"
    if image.high - image.low < MIN_HU_RANGE:
        return f"{bounds}: this looks like a windowed or normalised picture"
    if image.tissue_share < MIN_TISSUE_SHARE:
        return f"{bounds}: there is hardly any soft tissue ({TISSUE_HU[0]}..{TISSUE_HU[1]} HU)"
    if image.air_share >= MIN_AIR_SHARE:
        return None
    if image.low >= 0 and image.high > OFFSET_HU:
        return f"{bounds}: this looks like Hounsfield units + {OFFSET_HU}, stored without their rescale intercept"
    return f"{bounds}: there is no air ({AIR_HU[0]}..{AIR_HU[1]} HU), unless it was cropped to the inside of a body"


def _spacing(case: Case, facts: CaseFacts, _: Recipe) -> Iterator[Finding]:
    low, high = SPACING_MM
    if facts.image.is_readable and not all(low <= mm <= high for mm in facts.image.geometry.spacing_mm):
        spacing = " x ".join(f"{mm:.4g}" for mm in facts.image.geometry.spacing_mm)
        text = f"a spacing of {spacing} mm is unlikely for CT ({low:g}..{high:g} mm); is the header right?"
        yield Finding("warning", "spacing", case.name, text)


def _network_grid(case: Case, facts: CaseFacts, recipe: Recipe) -> Iterator[Finding]:
    from ctseg.preprocess import network_geometry

    if facts.image.is_readable:
        grid = facts.image.geometry
        try:
            network_geometry(grid, recipe.preprocess)
        except ImageError as error:
            yield Finding("error", "size", case.name, str(error))


def equal_images(manifest: Manifest, facts: Mapping[str, CaseFacts]) -> list[list[Case]]:
    """Cases whose images have the same voxels, in whatever files: a list for each image that comes more than once."""
    by_digest: dict[str, list[Case]] = defaultdict(list)
    for case in manifest.cases:
        if facts[case.name].image.is_readable:
            by_digest[facts[case.name].image.digest].append(case)
    return [cases for cases in by_digest.values() if len(cases) > 1]


def _duplicates(manifest: Manifest, facts: Mapping[str, CaseFacts], _: Recipe) -> Iterator[Finding]:
    for first, *others in equal_images(manifest, facts):
        for case in others:
            same = f"the same image as {first.name}"
            if case.split != first.split:
                text = f"{same}, which is in {first.split}, this in {case.split}; remove one"
                yield Finding("error", "duplicate", case.name, text)
            else:
                text = f"{same}, also in {case.split}: it counts twice; remove one (--fix does where labels agree)"
                yield Finding("warning", "duplicate", case.name, text)


def _equal_labels(manifest: Manifest, facts: Mapping[str, CaseFacts], _: Recipe) -> Iterator[Finding]:
    firsts: dict[str, Case] = {}
    for case in manifest.cases:
        label = facts[case.name].label
        if label is None or not label.is_readable or not label.values:
            continue
        first = firsts.setdefault(label.digest, case)
        if facts[first.name].image.digest != facts[case.name].image.digest:
            text = f"the same label as {first.name}, but another image; does one of them belong elsewhere?"
            yield Finding("warning", "same-label", case.name, text)


def _patients(manifest: Manifest, _facts: Mapping[str, CaseFacts], _: Recipe) -> Iterator[Finding]:
    firsts: dict[str, Case] = {}
    for case in manifest.cases:
        if case.patient is None:
            continue
        first = firsts.setdefault(case.patient, case)
        if first.split != case.split:
            text = f"the patient of this case in {case.split} is also in {first.split} ({first.name})"
            remedy = "move one of them, or deal all cases out with --split 80/10/10 --resplit"
            yield Finding("error", "patient", case.name, f"{text}; {remedy}")


def _unused_labels(manifest: Manifest, facts: Mapping[str, CaseFacts], recipe: Recipe) -> Iterator[Finding]:
    """Structures of the recipe that training would never see; an error if that is all of them."""
    labels = [facts[case.name].label for case in manifest.cases if case.split == "training"]
    readable = [label for label in labels if label is not None and label.is_readable]
    if not readable:
        return
    seen: set[Any] = {value for label in readable for value in label.values}
    if (recipe.preprocess.binarize_labels or recipe.clicks is not None) and seen:
        seen = {1}
    unseen = [f"{value} ({name})" for value, name in recipe.labels.items() if int(value) not in seen]
    if len(unseen) == len(recipe.labels):
        text = "no training label has any structure of the recipe; there is nothing to learn"
        yield Finding("error", "unused-label", None, text)
    elif unseen:
        text = f"no training label has {', '.join(unseen)}, which the recipe knows"
        yield Finding("warning", "unused-label", None, text)
