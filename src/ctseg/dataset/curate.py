"""From a data set as it is found to one that can be prepared: inspected, mended, split, checked, listed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctseg.dataset.checks import Finding, check_dataset, write_findings
from ctseg.dataset.fixes import mend
from ctseg.dataset.inspection import inspect_cases
from ctseg.dataset.splits import without_patient
from ctseg.errors import OutputError
from ctseg.files import make_folder, write_json
from ctseg.manifest import Manifest
from ctseg.progress import Progress
from ctseg.recipe import Recipe
from ctseg.workspace import manifest_to_dict

FACTS, FIXED = "checks", "fixed"
"""Folders below that of the prepared cases: facts about files, mended labels."""


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What is to be done to a data set besides checking it.

    Attributes:
        divide: Deals the cases out anew; None leaves the splits as they are.
        division: The same in words; "" without.
        fix: Whether to mend what is safe to mend.
        list_file: Where the resulting data list goes; None writes none.
    """

    divide: Callable[[Manifest], Manifest] | None = None
    division: str = ""
    fix: bool = False
    list_file: Path | None = None


@dataclass(frozen=True)
class Curated:
    """A data set after its checks.

    Attributes:
        manifest: With mended labels and the new splits.
        findings: Errors first.
        report: The findings as CSV; beside it is the same as JSON.
        list_file: The data list that was written, if one was: only without errors.
    """

    manifest: Manifest
    findings: list[Finding]
    report: Path
    list_file: Path | None

    @property
    def errors(self) -> list[Finding]:
        """The findings that must be put right by a person."""
        return [finding for finding in self.findings if finding.severity == "error"]


def curate(
    manifest: Manifest,
    recipe: Recipe,
    prepared: Path,
    wishes: Wishes,
    progress: Progress,
    stop_requested: Callable[[], bool] = lambda: False,
    workers: int | None = None,
) -> Curated:
    """The checked data set; what is wrong with it is a finding, not an error.

    Args:
        manifest: The data set as it is found; files may be missing.
        recipe: Whose rules it must obey.
        prepared: Folder of prepared cases, where reports, facts and mended labels lie too.
        wishes: What else is to be done.
        progress: Told of every case.
        stop_requested: Asked before each case.
        workers: Cases at once; default as many as CPUs and memory allow.

    Raises:
        ManifestError: if it cannot be split as wished.
        OutputError: if a report or a label cannot be written.
        Stopped: after a stop request.
    """
    divide = wishes.divide or (lambda same: same)
    divide(manifest)  # a wish that cannot be fulfilled is told before hours of reading
    facts = inspect_cases(manifest.cases, prepared / FACTS, progress, stop_requested, workers)
    findings: list[Finding] = []
    if wishes.fix:
        before = set(manifest.cases)
        manifest, findings = mend(manifest, facts, prepared / FIXED)
        mended = tuple(case for case in manifest.cases if case not in before)
        facts |= inspect_cases(mended, prepared / FACTS, progress, stop_requested, workers) if mended else {}
    manifest = divide(manifest)
    findings = check_dataset(manifest, facts, recipe) + findings
    if wishes.divide and (unknown := without_patient(manifest)):
        text = f"{unknown} labelled cases name no patient; each was taken for a patient of its own"
        findings.append(Finding("warning", "no-patient", None, text))
    report = write_findings(prepared, f"checks-{recipe.slug}", findings)
    has_errors = any(finding.severity == "error" for finding in findings)
    list_file = None if has_errors else wishes.list_file
    if list_file is not None:
        fixes = [f"{finding.case}: {finding.text}" for finding in findings if finding.severity == "fixed"]
        about = {"division": wishes.division, "fixes": fixes}
        _write_list(list_file, {**manifest_to_dict(manifest), **about})
    return Curated(manifest, findings, report, list_file)


def _write_list(path: Path, content: dict[str, Any]) -> None:
    """Writes a data list; one that is there is left alone if it is the same, and never replaced by another."""
    if path.exists():
        try:
            same = json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(content))
        except (OSError, ValueError):
            same = False
        if not same:
            raise OutputError(f"'{path}' is there already with other content; name another file with --write-manifest")
    write_json(make_folder(path.parent) / path.name, content)
