"""`ctseg infer`: masks for CTs, each on its own grid and in its own format."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ctseg.commands.common import (
    BackendOption,
    DeviceOption,
    GapsOption,
    JsonFlag,
    KeepIdentifiersFlag,
    ModelOption,
    PrecisionOption,
    QuietFlag,
    SeriesOption,
    TiltOption,
    check_no_clicks,
    check_none_failed,
    emit,
    rounded,
)
from ctseg.files import make_folder
from ctseg.jobs import Options, Shard, choose_shard, find_jobs
from ctseg.progress import make_progress
from ctseg.report.tables import render_table
from ctseg.workspace import resolve_model

if TYPE_CHECKING:
    from ctseg.engine.infer import Outcome


def infer(
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="INPUT...", help="CT files, DICOM files or zip archives, folders, lists (.txt, .json)."),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the masks.")],
    model: ModelOption = None,
    form: Annotated[
        Literal["nifti", "nrrd", "mha", "dicom-seg", "rtstruct"] | None,
        typer.Option("--format", help="Of the masks. Default: as the CT; NIfTI for DICOM."),
    ] = None,
    series: SeriesOption = None,
    gaps: GapsOption = "error",
    tilt: TiltOption = "error",
    seg_type: Annotated[
        Literal["binary", "labelmap"], typer.Option("--seg-type", help="Of DICOM SEG; every viewer reads binary.")
    ] = "binary",
    keep_empty_frames: Annotated[
        bool, typer.Option("--keep-empty-frames", help="DICOM SEG has a frame for every image, empty or not.")
    ] = False,
    keep_identifiers: KeepIdentifiersFlag = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Redo masks that are already there.")] = False,
    overlays: Annotated[bool, typer.Option("--overlays", help="Also draw a picture of every mask.")] = False,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Only the I-th of N parts of the CTs; auto: this Slurm array task's part."),
    ] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    backend: BackendOption = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Segment CTs (NIfTI, NRRD, MHA, DICOM): a mask on each input's own grid, in its own format or as DICOM SEG."""
    part = choose_shard(shard, os.environ)
    path = resolve_model(model)
    options = Options(
        series=series,
        gaps=gaps,
        tilt=tilt,
        keep_identifiers=keep_identifiers,
        format=form,
        seg_type=seg_type,
        keep_empty_frames=keep_empty_frames,
    )
    with make_progress(quiet) as progress:
        jobs = find_jobs(inputs, output, options, progress)
    make_folder(output)
    from ctseg.engine.infer import infer as run
    from ctseg.engine.model import load_model
    from ctseg.engine.runtime import running, stop_on_signal

    flags = {"overwrite": overwrite, "overlays": overlays}
    with (
        running(device, precision, amp=True, alone=True) as runtime,
        stop_on_signal() as stop_requested,
        make_progress(quiet) as progress,
    ):
        loaded = load_model(path, runtime, backend, progress.note)
        check_no_clicks(loaded.recipe, path)
        progress.note(f"model {path} on {runtime.describe()}, {loaded.backend}{_part(part)}")
        outcomes = run(
            loaded, jobs, output, progress, options=options, shard=part, stop_requested=stop_requested, **flags
        )
    emit([dataclasses.asdict(o) for o in outcomes], _text(outcomes, path), as_json)
    errors = [o.error for o in outcomes if o.status == "failed"]
    check_none_failed(errors, len(outcomes), f"files failed, listed in {output / part.failures}")


def _part(shard: Shard) -> str:
    return f", part {shard} of the CTs" if shard.count > 1 else ""


def _text(outcomes: list[Outcome], model: Path) -> str:
    structures = list(dict.fromkeys(name for o in outcomes for name in o.volumes_ml))
    rows = [
        (
            o.image,
            o.status,
            o.mask if o.status != "failed" else None,
            *(rounded(o.volumes_ml.get(s)) for s in structures),
        )
        for o in outcomes
    ]
    if not outcomes:
        return f"model {model}\n\nno CT in this part"
    counts = ", ".join(f"{n} {status}" for status, n in Counter(o.status for o in outcomes).items())
    table = render_table(("image", "status", "mask", *(f"{s}_ml" for s in structures)), rows)
    return f"model {model}\n\n{table}\n\n{counts}"
