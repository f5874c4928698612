"""Masks for many CTs: the model loaded once, finished files kept, a bad file reported and the rest done."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ctseg.engine.model import Model
from ctseg.engine.predict import OnWindow, predict
from ctseg.errors import CtsegError, ImageError
from ctseg.files import make_folder, write_csv, write_json
from ctseg.io.images import read_image, write_labels
from ctseg.jobs import FAILURES, Job
from ctseg.manifest import IMAGE_SUFFIXES, image_stem
from ctseg.progress import Progress
from ctseg.report.overlay import draw_overlay

RECORD = "ctseg_model.json"
"""Names the model whose masks a folder holds."""


@dataclass(frozen=True)
class Outcome:
    """What became of one CT: "done", "skipped" (its mask was there) or "failed"."""

    image: Path
    mask: Path
    status: str
    volumes_ml: dict[str, float]
    seconds: float
    error: str = ""


def infer(
    model: Model,
    jobs: list[Job],
    output: Path,
    progress: Progress,
    *,
    overwrite: bool = False,
    overlays: bool = False,
) -> list[Outcome]:
    """Writes the mask of every job that is not done yet; one outcome for each, in order.

    A mask is done when it is there and not older than its CT. Failed ones are listed in `failures.csv`.

    Raises:
        OutputError: if masks cannot be written; finished ones stay.
        CtsegError: if `output` holds another model's masks, unless `overwrite` is on and `jobs` replace them all.
    """
    make_folder(output)
    _claim(output, model, jobs, overwrite)
    outcomes = []
    progress.start(f"segmenting with {model.recipe.name}", len(jobs))
    for job in jobs:
        outcomes.append(_run(model, job, progress, overwrite, overlays))
        progress.advance(f"{job.image.name}: {outcomes[-1].error or outcomes[-1].status}")
    progress.finish()
    _write_failures(output, outcomes)
    return outcomes


def _claim(output: Path, model: Model, jobs: list[Job], overwrite: bool) -> None:
    """Records whose masks the folder holds, so that two models' masks never mix, whenever a run is cut off."""
    record = {"recipe": model.recipe.name, "model": model.path.name, "sha256": model.sha256}
    try:
        present = json.loads((output / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        present = record
    if not isinstance(present, dict):
        present = {}
    if present.get("sha256") != model.sha256:
        if not overwrite:
            raise CtsegError(
                f"'{output}' holds masks of another model ({present.get('recipe')}, {present.get('model')}); "
                f"choose another --output, or --overwrite to replace them"
            )
        replaced = {job.mask for job in jobs}
        masks = (path for path in sorted(output.rglob("*_seg.*")) if path.name.lower().endswith(IMAGE_SUFFIXES))
        left = [mask for mask in masks if mask not in replaced]
        if left:
            raise CtsegError(
                f"'{output}' holds {len(left)} masks of another model that would stay, e.g. '{left[0]}'; "
                f"choose another --output"
            )
        for job in jobs:
            job.mask.unlink(missing_ok=True)
    write_json(output / RECORD, record)


def show_windows(progress: Progress, name: str) -> OnWindow:
    """Progress through one CT, as a task below the running one."""

    def on_window(done: int, total: int) -> None:
        if done == 1:
            progress.start(name, total)
        progress.advance()
        if done == total:
            progress.finish()

    return on_window


def _run(model: Model, job: Job, progress: Progress, overwrite: bool, overlays: bool) -> Outcome:
    if not overwrite and _is_done(job):
        return Outcome(job.image, job.mask, "skipped", {}, 0.0)
    started = time.perf_counter()
    try:
        volume = read_image(job.image)
        mask = predict(model, volume, show_windows(progress, job.image.name))
    except ImageError as error:
        return Outcome(job.image, job.mask, "failed", {}, time.perf_counter() - started, str(error))
    except (torch.OutOfMemoryError, MemoryError):
        text = f"'{job.image}': not enough memory on {model.runtime.device}; try --device cpu or a machine with more"
        return Outcome(job.image, job.mask, "failed", {}, time.perf_counter() - started, text)
    make_folder(job.mask.parent)
    write_labels(job.mask, mask, volume.geometry)
    if overlays:
        picture = job.mask.with_name(f"{image_stem(job.mask)}.png")
        draw_overlay(picture, volume, mask, None, model.recipe.preprocess.hu_window, job.image.name)
    counts = np.bincount(mask.ravel(order="K"), minlength=model.recipe.num_classes)
    volumes = {n: float(counts[int(v)]) * volume.geometry.voxel_volume_ml for v, n in model.recipe.labels.items()}
    return Outcome(job.image, job.mask, "done", volumes, time.perf_counter() - started)


def _is_done(job: Job) -> bool:
    try:
        return job.mask.stat().st_mtime_ns >= job.image.stat().st_mtime_ns
    except OSError:
        return False


def _write_failures(output: Path, outcomes: list[Outcome]) -> None:
    failed = [{"image": str(o.image), "error": o.error} for o in outcomes if o.status == "failed"]
    if failed:
        write_csv(output / FAILURES, ("image", "error"), failed)
    else:
        (output / FAILURES).unlink(missing_ok=True)
