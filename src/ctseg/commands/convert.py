"""`ctseg convert`: CTs between DICOM, NIfTI, NRRD and MHA, with a geometry report."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ctseg.commands.common import (
    GapsOption,
    JsonFlag,
    KeepIdentifiersFlag,
    QuietFlag,
    SeriesOption,
    TiltOption,
    check_none_failed,
    emit,
)
from ctseg.errors import CtsegError
from ctseg.files import write_json
from ctseg.manifest import is_image_name
from ctseg.progress import make_progress
from ctseg.report.tables import render_table

if TYPE_CHECKING:
    from ctseg.convert import Conversion


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="DICOM folder, zip or file; image file; folder of any.")
    ],
    output: Annotated[Path, typer.Argument(metavar="DST", help="Image file for one CT, or a folder.")],
    form: Annotated[
        Literal["nifti", "nrrd", "mha", "dicom"] | None,
        typer.Option("--format", help="Of the CTs in the folder DST. Default: nifti."),
    ] = None,
    series: SeriesOption = None,
    gaps: GapsOption = "error",
    tilt: TiltOption = "error",
    labels: Annotated[bool, typer.Option("--labels", help="SRC holds label maps, not CT.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is already there.")] = False,
    report: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write what was found and done.")] = None,
    keep_identifiers: KeepIdentifiersFlag = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Convert CTs: DICOM to NIfTI, NRRD or MHA and back; an archive to a data set with its manifest."""
    if not source.exists():
        raise CtsegError(f"source '{source}': no such file or folder")
    names_format = is_image_name(output)
    if names_format and form is not None:
        raise CtsegError(f"--format is for a folder of CTs, and '{output.name}' names its format; leave one out")
    from ctseg.convert import Options, convert_all, convert_one

    options = Options(
        rule=series, gaps=gaps, tilt=tilt, labels=labels, overwrite=overwrite, keep_identifiers=keep_identifiers
    )
    with make_progress(quiet) as progress:
        if names_format or (form == "dicom" and is_image_name(source)):
            converted = convert_one(source, output, options, progress)
        else:
            converted = convert_all(source, output, form or "nifti", options, progress)
    if report is not None:
        write_json(report, converted.to_dicts())
    results = converted.results
    emit([result.to_dict() for result in results], _text(results), as_json)
    check_none_failed([r.error for r in results if r.status == "failed"], len(results), "CTs failed")


def _text(results: list[Conversion]) -> str:
    rows = [(result.source, result.status, *_grid(result), _notes(result)) for result in results]
    table = render_table(("source", "status", "output", "size", "spacing_mm", "axes", "notes"), rows)
    counts = ", ".join(f"{count} {status}" for status, count in Counter(result.status for result in results).items())
    return f"{table}\n\n{counts}"


def _grid(result: Conversion) -> tuple[str | None, str | None, str | None, str | None]:
    output = None if result.status == "failed" else str(result.output)
    if result.grid is None:
        return output, None, None, None
    size = "x".join(map(str, result.grid["size"]))
    spacing = "x".join(f"{value:.4g}" for value in result.grid["spacing_mm"])
    return output, size, spacing, result.grid["axes"]


def _notes(result: Conversion) -> str | None:
    """What was repaired or rounded, in a few words; the whole of it stands in the report."""
    dicom = result.dicom or {}
    notes = []
    if dicom.get("filled_slices"):
        notes.append(f"filled {len(dicom['filled_slices'])} slices")
    if abs(dicom.get("closed_up_mm", 0.0)) >= 0.01:
        notes.append(f"far end off by {dicom['closed_up_mm']:.3g} mm")
    if dicom.get("sheared"):
        notes.append("sheared")
    notes += [finding["code"] for finding in dicom.get("notes", [])]
    if result.largest_change_hu > 0:
        notes.append(f"rounded by up to {result.largest_change_hu:.2g} HU")
    return ", ".join(dict.fromkeys(notes)) or None
