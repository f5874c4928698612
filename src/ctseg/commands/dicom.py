"""`ctseg dicom`: what lies in folders and archives of DICOM, before any of it is used."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctseg.commands.common import JsonFlag, KeepIdentifiersFlag, QuietFlag, SeriesOption, emit
from ctseg.errors import CtsegError, list_problems
from ctseg.privacy import pseudonym, pseudonym_key
from ctseg.progress import make_progress
from ctseg.report.tables import render_table

if TYPE_CHECKING:
    from ctseg.io.dicom.read import Found
    from ctseg.io.dicom.series import Finding, Series

MAX_REJECTED = 10
"""Files that the text names; --json names all."""

dicom = typer.Typer(
    name="dicom", help="`dicom ls` lists what lies in DICOM folders and archives.", rich_markup_mode=None
)


@dicom.callback()
def group() -> None:
    """`dicom ls` lists what lies in DICOM folders and archives."""


@dicom.command("ls")
def list_series(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Folders, zip archives or files.")],
    series: SeriesOption = None,
    keep_identifiers: KeepIdentifiersFlag = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """List the series in folders and zip archives, with everything that is wrong with them."""
    from ctseg.io.dicom.read import MAX_LISTED, describe, find_series
    from ctseg.io.dicom.rule import choose
    from ctseg.io.dicom.silence import pydicom_silent

    if series is not None:
        choose([], series)  # a wrong rule is told before the search
    with make_progress(quiet) as progress:
        found = find_series(paths, progress)
    rejected = found.left_out(keep_identifiers=keep_identifiers)
    if not found.series and not found.others:
        reasons = [f"{name}: {reason}" for name, reason in rejected[:MAX_REJECTED]]
        searched = f"no DICOM in {', '.join(repr(str(path)) for path in paths[:3])}"
        raise CtsegError(list_problems(searched, reasons or ["name the folder or archive that holds it"]))
    with pydicom_silent():
        chosen = found.series if series is None else choose(found.series, series)
        if not chosen and series is not None and found.series:
            there = [describe(one) for one in found.series[:MAX_LISTED]]
            raise CtsegError("\n  ".join([f"no series passes --series '{series}'; there are:", *there]))
        rows = [_row(one, keep_identifiers) for one in chosen]
        data = {"series": rows, **_rest(found, rejected, keep_identifiers)}
    emit(data, _text(chosen, rows, found, rejected), as_json)


def _row(one: Series, keep_identifiers: bool) -> dict[str, Any]:
    from ctseg.io.dicom.report import number, orientation, text, whole_number

    row: dict[str, Any] = {
        "number": one.number,
        "name": pseudonym(one.uid, pseudonym_key()) if one.uid else None,
        "kind": one.kind,
        "description": text(one, "SeriesDescription"),
        "series_number": whole_number(one, "SeriesNumber"),
        "slices": len(one),
        "size": one.slices[0].size,
        "spacing_mm": [None if value is None or value != value else value for value in one.spacing_mm],
        "thickness_mm": number(one, "SliceThickness"),
        "orientation": orientation(one),
        "tilt_degrees": one.geometry.tilt_degrees if one.geometry else None,
        "kernel": text(one, "ConvolutionKernel"),
        "kvp": number(one, "KVP"),
        "contrast": (text(one, "ContrastBolusAgent") or "none").lower() not in ("none", "no"),
        "problems": [dataclasses.asdict(problem) for problem in one.problems],
        "notes": [dataclasses.asdict(note) for note in one.notes],
    }
    if keep_identifiers:
        row["series_uid"] = one.uid
        row["study_uid"], row["patient_id"] = text(one, "StudyInstanceUID"), text(one, "PatientID")
        row["files"] = {image.source.shown: image.source.full for image in one.slices}
    return row


def _rest(found: Found, rejected: Sequence[tuple[str, str]], keep_identifiers: bool) -> dict[str, Any]:
    from ctseg.io.dicom.tags import tag_value
    from ctseg.progress import printable

    return {
        "others": [
            {
                "kind": other.kind,
                "description": printable(str(tag_value(other.header, "SeriesDescription") or "")) or None,
                "file": other.source.named(keep_identifiers=keep_identifiers),
            }
            for other in found.others
        ],
        "rejected": [{"file": name, "reason": reason} for name, reason in rejected],
        "not_dicom": found.not_dicom,
    }


def _text(
    chosen: Sequence[Series], rows: Sequence[dict[str, Any]], found: Found, rejected: Sequence[tuple[str, str]]
) -> str:
    columns = ("#", "kind", "description", "slices", "size", "spacing_mm", "thick", "lies", "kernel", "kVp", "contrast")
    identifiers = [name for name in ("patient_id", "study_uid", "series_uid") if rows and name in rows[0]]
    table = render_table(
        (*columns, "name", *identifiers, "problems"),
        [(*_cells(row), row["name"], *(row[i] for i in identifiers), _codes(row)) for row in rows],
    )
    return "\n".join([table if rows else "no series of images", *_findings(chosen), *_remarks(found, rejected)])


def _cells(row: dict[str, Any]) -> tuple[object, ...]:
    thickness, kvp, tilt = row["thickness_mm"], row["kvp"], row["tilt_degrees"] or 0.0
    return (
        f"#{row['number']}",
        row["kind"],
        row["description"],
        row["slices"],
        "x".join(str(n) for n in row["size"]),
        "x".join("?" if value is None else f"{value:.3g}" for value in row["spacing_mm"]),
        None if thickness is None else f"{thickness:g}",
        row["orientation"] if tilt < 0.1 else f"{row['orientation']}, tilt {tilt:.1f}",
        row["kernel"],
        None if kvp is None else f"{kvp:g}",
        "yes" if row["contrast"] else None,
    )


def _codes(row: dict[str, Any]) -> str | None:
    """Codes of problems, and of notes in brackets."""
    notes = [f"({note['code']})" for note in row["notes"]]
    return " ".join(dict.fromkeys([*(problem["code"] for problem in row["problems"]), *notes])) or None


def _findings(chosen: Sequence[Series]) -> list[str]:
    def lines(one: Series, findings: Sequence[Finding], mark: str) -> list[str]:
        return [f"#{one.number} {mark}{finding.code}: {finding.text}" for finding in findings]

    found = [line for one in chosen for line in (*lines(one, one.problems, ""), *lines(one, one.notes, "note "))]
    return ["", *found] if found else []


def _remarks(found: Found, rejected: Sequence[tuple[str, str]]) -> list[str]:
    lines = [f"{count} x {kind}" for kind, count in Counter(other.kind for other in found.others).items()]
    remarks = ["", f"other objects: {', '.join(lines)}"] if lines else []
    if rejected:
        remarks += ["", f"{len(rejected)} files cannot be used:"]
        remarks += [f"  {name}: {reason}" for name, reason in rejected[:MAX_REJECTED]]
    return remarks
