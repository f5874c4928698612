"""Masks for many CTs: the model loaded once, finished files kept, a bad file reported and the rest done."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ctseg.dicom_jobs import STRICT
from ctseg.engine.cases import read_case, write_mask
from ctseg.engine.model import Model
from ctseg.engine.predict import OnWindow, predict
from ctseg.engine.runtime import memory_errors
from ctseg.errors import CtsegError, ImageError, NotEnoughMemory, Stopped
from ctseg.files import make_folder, output_errors, write_csv, write_json
from ctseg.jobs import PLAIN, Job, Options, Shard, is_mask_name
from ctseg.manifest import image_stem
from ctseg.progress import Progress
from ctseg.provenance import differences, read_object
from ctseg.report.overlay import draw_overlay

RECORD = "ctseg_model.json"
"""Names the model whose masks a folder holds."""
WHOLE = Shard()


@dataclass(frozen=True)
class Outcome:
    """What became of one CT: "done", "skipped" (its mask was there) or "failed".

    Attributes:
        notes: What was repaired or odd about a DICOM series, or missing in its header.
    """

    image: Path
    mask: Path
    status: str
    volumes_ml: dict[str, float]
    seconds: float
    error: str = ""
    notes: tuple[str, ...] = ()


def infer(
    model: Model,
    jobs: list[Job],
    output: Path,
    progress: Progress,
    *,
    options: Options = PLAIN,
    overwrite: bool = False,
    overlays: bool = False,
    shard: Shard = WHOLE,
    stop_requested: Callable[[], bool] = lambda: False,
) -> list[Outcome]:
    """Writes the mask of every job of `shard` that is not done yet; one outcome for each, in order.

    A mask is done when it is there and not older than its CT. Failed ones are listed in `failures.csv`. A shard
    never replaces another model's masks: what it took for old ones could be another shard's new ones.

    Raises:
        OutputError: if masks cannot be written; finished ones stay.
        CtsegError: if `output` holds masks of another model or made with other options, unless `overwrite` is on and
            `jobs` replace them all.
        Stopped: after a stop request, which is looked for after every window; finished masks stay.
    """
    make_folder(output)
    mine = shard.take(jobs)
    _claim(output, model, mine, options.record(jobs), overwrite and shard.count == 1)
    outcomes: list[Outcome] = []

    def stop() -> None:
        if stop_requested():
            raise Stopped(f"stopped by a signal after {len(outcomes)} of {len(mine)} CTs; the same command goes on")

    progress.start(f"segmenting with {model.recipe.name}", len(mine))
    for job in mine:
        stop()
        if not overwrite and _is_done(job):
            outcomes.append(Outcome(job.image, job.mask, "skipped", {}, 0.0))
        else:
            outcomes.append(_run(model, job, options, progress, overlays, stop))
        _record_failures(output / shard.failures, outcomes[-1])
        progress.advance(f"{job.image.name}: {outcomes[-1].error or outcomes[-1].status}")
    progress.finish()
    return outcomes


def _claim(output: Path, model: Model, jobs: list[Job], made_with: dict[str, Any], overwrite: bool) -> None:
    """Records how the folder's masks are made, so that those of two models or ways never mix when a run is cut off."""
    record = {"recipe": model.recipe.name, "model": model.path.name, "sha256": model.sha256}
    present = read_object(output / RECORD)
    if not present:  # masks of unknown origin are not ours
        present = {} if any(job.mask.exists() for job in jobs) else record | made_with
    different = differences({"fast": False} | present, made_with, STRICT)  # an older folder does not say
    if present.get("sha256") != model.sha256:
        whose = ", ".join(str(present[key]) for key in ("recipe", "model") if key in present)
        _replace(output, jobs, f"masks of another model ({whose or 'of unknown origin'})", overwrite)
        present = {}
    elif different:
        _replace(output, jobs, f"masks made with other options ({', '.join(different)})", overwrite)
    write_json(output / RECORD, present | record | made_with)


def _replace(output: Path, jobs: list[Job], what: str, overwrite: bool) -> None:
    """Removes the masks of `jobs`, if that is allowed and leaves none of the others."""
    if not overwrite:
        raise CtsegError(
            f"'{output}' holds {what}; choose another --output, or --overwrite (without --shard) to replace them"
        )
    replaced = {job.mask for job in jobs}
    left = [path for path in sorted(output.rglob("*")) if is_mask_name(path) and path not in replaced]
    if left:
        raise CtsegError(
            f"'{output}' holds {what}, and {len(left)} would stay, e.g. '{left[0]}'; choose another --output"
        )
    with output_errors(output):
        for job in jobs:
            job.mask.unlink(missing_ok=True)


@contextmanager
def show_windows(progress: Progress, name: str, stop: Callable[[], None] = lambda: None) -> Iterator[OnWindow]:
    """Progress through one CT, as a task below the running one; the task ends with the context, whatever happens.

    When more windows turn out to be needed, a new task is begun for them. `stop` is called after every window and may
    raise.
    """
    known = 0

    def on_window(done: int, total: int) -> None:
        nonlocal known
        if total > known:
            if known:
                progress.finish()
            progress.start(name, total - known)
            known = total
        progress.advance()
        stop()

    try:
        yield on_window
    finally:
        if known:
            progress.finish()


def _run(
    model: Model, job: Job, options: Options, progress: Progress, overlays: bool, stop: Callable[[], None]
) -> Outcome:
    started = time.perf_counter()
    try:
        with memory_errors(f"'{job.image}'", model.runtime.device):
            case = read_case(job, options)
        with show_windows(progress, job.image.name, stop) as on_window:
            mask = predict(model, case.volume, on_window, fast=options.fast)
        notes = case.notes + write_mask(job, case, mask, model, options)
    except (ImageError, NotEnoughMemory) as error:
        text = str(error) if str(job.image) in str(error) else f"'{job.image}': {error}"
        return Outcome(job.image, job.mask, "failed", {}, time.perf_counter() - started, text)
    for note in notes:
        progress.note(f"{job.image.name}: {note}")
    volume = case.volume
    if overlays:
        stem = image_stem(job.mask)
        title = job.image.name if job.series is None else stem  # a folder may be called as the patient is
        hu_window = model.recipe.preprocess.hu_window
        draw_overlay(job.mask.with_name(f"{stem}.png"), volume, mask, None, hu_window, title)
    counts = np.bincount(mask.ravel(order="K"), minlength=model.recipe.num_classes)
    volumes = {n: float(counts[int(v)]) * volume.geometry.voxel_volume_ml for v, n in model.recipe.labels.items()}
    return Outcome(job.image, job.mask, "done", volumes, time.perf_counter() - started, notes=notes)


def _is_done(job: Job) -> bool:
    try:
        return job.mask.stat().st_mtime_ns >= max(file.stat().st_mtime_ns for file in job.files)
    except OSError:
        return False


def _record_failures(path: Path, outcome: Outcome) -> None:
    """Brings `failures.csv` up to date after each file: its row comes, goes or stays; without rows there is no file."""
    image = str(outcome.image)
    before = _read_failures(path)
    rows = [row for row in before if row["image"] != image]
    if outcome.status == "failed":
        rows.append({"image": image, "error": outcome.error})
    if rows and rows != before:
        write_csv(path, ("image", "error"), rows)
    elif not rows:
        path.unlink(missing_ok=True)


def _read_failures(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [{"image": row["image"], "error": row["error"]} for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, csv.Error):
        return []
