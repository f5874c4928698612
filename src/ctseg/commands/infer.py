"""`ctseg infer`: masks for CTs, each on its own grid and in its own format."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ctseg import slurm
from ctseg.ahead import forget_unpacked, unpacking_ahead
from ctseg.commands.common import (
    BackendOption,
    DeviceOption,
    FastFlag,
    GapsOption,
    JsonFlag,
    KeepIdentifiersFlag,
    MaxMemoryOption,
    ModelOption,
    PrecisionOption,
    QuietFlag,
    SeriesOption,
    TiltOption,
    check_no_clicks,
    check_none_failed,
    emit,
    parse_bytes,
    rounded,
)
from ctseg.errors import CasesFailed, CtsegError
from ctseg.files import folder_if_used, make_folder
from ctseg.jobs import Job, ModelChoice, Options, Shard, choose_shard, find_jobs
from ctseg.lean import import_nibabel_alone, importing, keep_to_the_end
from ctseg.progress import make_progress
from ctseg.report.tables import render_table
from ctseg.workspace import resolve_model

if TYPE_CHECKING:
    from ctseg.engine.infer import Outcome
    from ctseg.engine.plan import RunPlan

ASKED_AGAIN = "CTSEG_ASKED_AGAIN"
"""Environment variable: this process is the one that `_ask_again` has started."""


def infer(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUT...", help="CT files, DICOM files or zip archives, folders, lists (.json, .txt, .csv)."
        ),
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
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=1, help="Deal the CTs out to this many processes, one per GPU.")
    ] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    backend: BackendOption = "auto",
    max_memory: MaxMemoryOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what each CT will take.")] = False,
    fast: FastFlag = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Segment CTs (NIfTI, NRRD, MHA, DICOM): a mask on each input's own grid, in its own format or as DICOM SEG."""
    part = choose_shard(shard, os.environ)
    max_bytes = None if max_memory is None else parse_bytes(max_memory, "--max-memory")
    path = resolve_model(model)
    options = Options(
        series=series,
        gaps=gaps,
        tilt=tilt,
        keep_identifiers=keep_identifiers,
        format=form,
        seg_type=seg_type,
        keep_empty_frames=keep_empty_frames,
        fast=fast,
        overwrite=overwrite,
        overlays=overlays,
    )
    choice = ModelChoice(path=path, device=device, precision=precision, backend=backend, fast=fast)
    if dry_run and gpus is not None:
        raise CtsegError("--dry-run tells what one process takes; leave --gpus out")
    in_parts = _launches(gpus, device)
    with make_progress(quiet) as progress:
        jobs = find_jobs(inputs, output, options, progress)
    if in_parts:
        with folder_if_used(output):
            _infer_in_parts(gpus or 1, shard, path, as_json)
        return
    todo = [job for job in part.take(jobs) if options.overwrite or not job.is_done]
    with unpacking_ahead(None if dry_run else _first_packed(todo)):
        plans, outcomes = _segment(
            choice, jobs, todo, output, options, part, max_bytes=max_bytes, dry_run=dry_run, quiet=quiet
        )
    if dry_run:
        emit(dataclasses.asdict(plans), f"model {path}\n\n{_plan_table(plans)}\n\n{plans.summary()}", as_json)
        check_none_failed([plan.error for plan in plans.cases if plan.error], len(plans.cases), "CTs cannot be done")
        return
    emit([dataclasses.asdict(o) for o in outcomes], _text(outcomes, path), as_json)
    errors = [o.error for o in outcomes if o.status == "failed"]
    check_none_failed(errors, len(outcomes), f"files failed, listed in {output / part.failures}")


def _segment(
    choice: ModelChoice,
    jobs: list[Job],
    todo: list[Job],
    output: Path,
    options: Options,
    part: Shard,
    *,
    max_bytes: int | None,
    dry_run: bool,
    quiet: bool,
) -> tuple[RunPlan, list[Outcome]]:
    """How the CTs of `todo` are to be done; unless that is all that is asked for, what became of those of the part."""
    with importing():
        from ctseg.engine.model import load_to_segment, next_run_is_leaner, runtime_for
        from ctseg.engine.process import stop_on_signal

    with (
        _output_folder(output, part, dry_run),
        runtime_for(choice) as runtime,
        stop_on_signal() as stop_requested,
        make_progress(quiet) as progress,
    ):
        loaded = load_to_segment(choice, runtime, progress.note)
        keep_to_the_end(loaded)
        if dry_run and next_run_is_leaner(loaded) and ASKED_AGAIN not in os.environ:
            _ask_again()
        # A network from the cache is still being loaded by a thread, which wants no pydicom.
        import_nibabel_alone()
        with importing():
            from ctseg.engine.infer import infer as run
            from ctseg.engine.plan import plan_run

        check_no_clicks(loaded.recipe, choice.path)
        fast = ", fast" if options.fast else ""
        progress.note(f"model {choice.path} on {loaded.runtime.describe()}, {loaded.backend}{fast}{_part(part)}")
        plans = plan_run(loaded, todo, options, output, progress, max_bytes=max_bytes, measure=dry_run)
        progress.note(plans.summary())
        if dry_run:
            return plans, []
        if plans.cases and plans.cases[0].error:
            forget_unpacked()
        outcomes = run(
            loaded,
            jobs,
            output,
            progress,
            options=options,
            shard=part,
            plans={job.mask: plan for job, plan in zip(todo, plans.cases, strict=True)},
            overlap=plans.overlap,
            stop_requested=stop_requested,
        )
    return plans, outcomes


def _first_packed(todo: list[Job]) -> Path | None:
    """The first CT, if it is a file that can be unpacked ahead."""
    if not todo or todo[0].series is not None or not todo[0].image.name.lower().endswith(".nii.gz"):
        return None
    return todo[0].image


def _output_folder(output: Path, part: Shard, dry_run: bool) -> AbstractContextManager[Path]:
    """The folder of the masks, made at once if it can be; it goes again if nothing comes of the run.

    One that several processes share stays: another one may be about to write to it.
    """
    if dry_run:
        return nullcontext(output)
    return folder_if_used(output) if part.count == 1 else nullcontext(make_folder(output))


def _launches(gpus: int | None, device: str) -> bool:
    """Whether this process starts others, one per GPU, and is none of them itself; checks that it can."""
    if gpus is None or "RANK" in os.environ:
        return False
    tasks = slurm.num_tasks(os.environ)
    if gpus > 1 and tasks > 1:
        raise CtsegError(
            f"--gpus {gpus}: srun has started {tasks} tasks already, each of them one process on one GPU; leave "
            f"--gpus out, or start one task (srun --ntasks=1)"
        )
    from ctseg.engine.launch import check_gpus

    check_gpus(gpus, device)
    return gpus > 1


def _infer_in_parts(gpus: int, shard: str | None, model: Path, as_json: bool) -> None:
    from ctseg.engine.infer import Outcome
    from ctseg.engine.parts import run_parts

    name, *arguments = sys.argv[1:]
    answers = run_parts(gpus, [name, "--json", "--shard", shard or "1/1", *arguments])  # first, as -- may follow
    outcomes = [Outcome(**{**row, "image": Path(row["image"]), "mask": Path(row["mask"])}) for row in answers.rows]
    emit(answers.rows, _text(outcomes, model), as_json)
    if answers.failed:
        raise CasesFailed  # each process has told its own


def _ask_again() -> None:
    """Has a process of its own tell the plan, and ends with its code: compiling has left memory that no run needs."""
    again = [sys.executable, "-m", "ctseg", *sys.argv[1:]]
    done = subprocess.run(again, env={**os.environ, ASKED_AGAIN: "1"}, capture_output=True, text=True, check=False)
    typer.echo(done.stdout, nl=False)
    typer.echo(done.stderr, nl=False, err=True)
    raise typer.Exit(done.returncode)


def _part(shard: Shard) -> str:
    return f", part {shard} of the CTs" if shard.count > 1 else ""


def _plan_table(plans: RunPlan) -> str:
    columns = ("image", "voxels", "windows", "memory_GB", "disk_GB", "seconds", "way")
    rows = [
        (
            plan.image,
            "x".join(map(str, plan.size)) if plan.windows else None,
            plan.windows or None,
            f"{plan.memory_bytes / 1e9:.2f}",
            f"{plan.disk_bytes / 1e9:.2f}",
            rounded(plan.seconds),
            plan.way,
        )
        for plan in plans.cases
    ]
    return render_table(columns, rows)


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
