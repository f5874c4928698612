"""What can be mended in a data set without a person's judgement. The user's files are never changed.

- A label of its image's size, up to half a voxel off: a copy with the image's grid takes its place.
- A case whose image and label are those of an earlier one in its split: dropped from the list.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from ctseg.dataset.checks import Finding, equal_images, is_mendable
from ctseg.dataset.inspection import CaseFacts
from ctseg.files import make_folder
from ctseg.io.images import read_labels, write_labels
from ctseg.manifest import Case, Manifest


def mend(manifest: Manifest, facts: Mapping[str, CaseFacts], folder: Path) -> tuple[Manifest, list[Finding]]:
    """The mended data set and what was done to it.

    Args:
        manifest: The data set.
        facts: Of every case, by its name.
        folder: Where mended labels go.

    Raises:
        OutputError: if a label cannot be written.
    """
    dropped = _to_drop(manifest, facts)
    findings = [Finding("fixed", "duplicate", name, f"dropped: the same as {first}") for name, first in dropped.items()]
    cases = []
    for case in manifest.cases:
        if case.name in dropped:
            continue
        if is_mendable(facts[case.name]):
            case = dataclasses.replace(case, label=_with_image_grid(case, facts[case.name], folder))
            findings.append(
                Finding("fixed", "grid", case.name, f"the label's copy in '{case.label}' has the image's grid")
            )
        cases.append(case)
    return dataclasses.replace(manifest, cases=tuple(cases)), findings


def _to_drop(manifest: Manifest, facts: Mapping[str, CaseFacts]) -> dict[str, str]:
    """Name of a case that says nothing new -> name of the one that says it already."""
    dropped = {}
    for cases in equal_images(manifest, facts):
        firsts: dict[tuple[str | None, ...], str] = {}
        for case in cases:
            label = facts[case.name].label
            if label is not None and not label.is_readable:
                continue
            key = (case.split, case.patient, None if label is None else label.digest)
            first = firsts.setdefault(key, case.name)
            if first != case.name:
                dropped[case.name] = first
    return dropped


def _with_image_grid(case: Case, facts: CaseFacts, folder: Path) -> Path:
    """The path of the label's copy on the image's grid, named by what it is made from, so that it is made once."""
    assert case.label is not None  # it has a grid to mend
    about = [str(case.label.absolute()), facts.image.affine, facts.label.digest if facts.label else ""]
    digest = hashlib.sha256(json.dumps(about).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    path = make_folder(folder) / f"{case.name[:40]}-{digest}.nii.gz"
    if not path.exists():
        write_labels(path, read_labels(case.label).array, facts.image.geometry)
    return path
