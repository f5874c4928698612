"""`ctseg labels`: training data from DICOM segmentations, SEG and RTSTRUCT."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ctseg.commands.common import (
    GapsOption,
    JsonFlag,
    KeepIdentifiersFlag,
    QuietFlag,
    TiltOption,
    check_none_failed,
    emit,
)
from ctseg.errors import CtsegError
from ctseg.progress import make_progress
from ctseg.report.tables import render_table

if TYPE_CHECKING:
    from ctseg.dicom_labels import Labelled


def labels(
    sources: Annotated[
        list[Path], typer.Argument(metavar="SRC...", help="Folders, zip archives or files of DICOM, any mix.")
    ],
    output: Annotated[Path | None, typer.Option(help="Folder for images, labels and their manifest data.json.")] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            metavar="VALUE=PATTERN",
            help="Which segment or ROI becomes which label: 1=liver, 2=#3, 3=code:SCT:10200004, 4=/lung.*left/. "
            "May be repeated, also for one value.",
        ),
    ] = None,
    list_only: Annotated[bool, typer.Option("--list", help="Only list the names that occur, with counts.")] = False,
    only: Annotated[
        Literal["SEG", "RTSTRUCT"] | None, typer.Option(case_sensitive=False, help="Leave the other kind aside.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Make one label of all the objects of a CT.")] = False,
    overlap: Annotated[
        Literal["error", "first", "last"],
        typer.Option(help="Where two labels overlap: refuse, or keep the one that --label names first or last."),
    ] = "error",
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="A CT may lack some of the labels, not all.")
    ] = False,
    gaps: GapsOption = "error",
    tilt: TiltOption = "error",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is already there.")] = False,
    keep_identifiers: KeepIdentifiersFlag = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Make training data of DICOM: each CT with its SEG or RTSTRUCT as image and label map, and a manifest."""
    missing = [path for path in sources if not path.exists()]
    if missing:
        raise CtsegError(f"source '{missing[0]}': no such file or folder")
    if list_only:
        _list(sources, as_json, quiet)
        return
    if output is None or not label:
        raise CtsegError("--output and at least one --label are needed; --list shows which names there are")
    from ctseg.dicom_labels import Options, collect_labels
    from ctseg.io.dicom.regions import parse_choice

    options = Options(
        choices=tuple(parse_choice(text) for text in label),
        only=only,
        merge=merge,
        overlap=overlap,
        allow_missing=allow_missing,
        gaps=gaps,
        tilt=tilt,
        keep_identifiers=keep_identifiers,
        overwrite=overwrite,
    )
    with make_progress(quiet) as progress:
        results = collect_labels(sources, output, options, progress)
    emit([dataclasses.asdict(result) for result in results], _text(results), as_json)
    check_none_failed([r.error for r in results if r.status == "failed"], len(results), "failed")


def _list(sources: list[Path], as_json: bool, quiet: bool) -> None:
    from ctseg.dicom_labels import count_regions

    with make_progress(quiet) as progress:
        counts = count_regions(sources, progress)
    rows = [
        (count.name, count.kind, count.objects, ", ".join(f"#{n}" for n in count.numbers[:5]), ", ".join(count.codes))
        for count in counts
    ]
    table = render_table(("name", "kind", "times", "numbers", "codes"), rows)
    emit([dataclasses.asdict(count) for count in counts], table, as_json)


def _text(results: list[Labelled]) -> str:
    rows = [
        (
            result.source,
            result.status,
            result.label,
            "; ".join(f"{value}: {', '.join(names)}" for value, names in result.regions.items()) or None,
            "; ".join(f"{value}: {ml:.1f}" for value, ml in result.volumes_ml.items()) or None,
        )
        for result in results
    ]
    table = render_table(("source", "status", "label", "made of", "ml"), rows)
    counts = ", ".join(f"{count} {status}" for status, count in Counter(r.status for r in results).items())
    notes = [f"{result.source}: {note}" for result in results for note in result.notes]
    return "\n".join([table, "", counts, *notes])
