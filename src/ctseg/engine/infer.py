"""Masks for many CTs: the model loaded once, finished files kept, a bad file reported and the rest done."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ctseg.engine.model import Model
from ctseg.engine.predict import OnWindow, predict
from ctseg.errors import CtsegError, ImageError
from ctseg.files import make_folder, write_csv, write_json
from ctseg.io.images import read_image, write_labels
from ctseg.manifest import IMAGE_SUFFIXES, image_stem, read_manifest
from ctseg.progress import Progress

RECORD = "ctseg_model.json"
"""Names the model whose masks a folder holds."""
FAILURES = "failures.csv"


@dataclass(frozen=True)
class Job:
    """One CT and where its mask goes."""

    image: Path
    mask: Path


@dataclass(frozen=True)
class Outcome:
    """What became of one CT: "done", "skipped" (its mask was there) or "failed"."""

    image: Path
    mask: Path
    status: str
    volumes_ml: dict[str, float]
    seconds: float
    error: str = ""


def find_jobs(inputs: list[Path], output: Path) -> list[Job]:
    """One job for each CT that `inputs` name, masks below `output`.

    Args:
        inputs: Image files, folders (searched with their subfolders), or lists (`.txt` with one path a line, or a
            JSON manifest, whose cases of all splits are taken).
        output: Folder of the masks. `a/ct.nii.gz` gives `ct_seg.nii.gz`; files from a folder keep their subfolder,
            and files whose names collide keep the part of their path that tells them apart.

    Raises:
        CtsegError: if an input does not exist, or none names a CT.
    """
    found: list[tuple[Path, Path]] = []  # image, and its path relative to the output
    for path in inputs:
        if path.is_dir():
            found += [(image, image.relative_to(path)) for image in _images_below(path, output)]
        elif path.suffix in (".txt", ".json"):
            found += _told_apart([case.image for case in read_manifest(path).cases])
        elif path.exists():
            found.append((path, Path(path.name)))
        else:
            raise CtsegError(f"input '{path}': no such file or folder")
    if len({relative for _, relative in found}) < len({image.absolute() for image, _ in found}):
        found = _told_apart([image for image, _ in found])
    if not found:
        raise CtsegError(f"no CT in {', '.join(map(str, inputs))}; known suffixes: {', '.join(IMAGE_SUFFIXES)}")
    unique = {image.absolute(): (image, relative) for image, relative in found}
    return [Job(image, output / _mask_name(relative)) for image, relative in unique.values()]


def _images_below(folder: Path, output: Path) -> list[Path]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name.lower().endswith(IMAGE_SUFFIXES))
    inside = output.absolute()
    return [p for p in files if not p.name.startswith(".") and not p.absolute().is_relative_to(inside)]


def _told_apart(images: list[Path]) -> list[tuple[Path, Path]]:
    """Images by file name alone where that is unique, else by the path below their common folder."""
    repeated = {name for name, n in Counter(image.name for image in images).items() if n > 1}
    common = Path(os.path.commonpath([image.absolute().parent for image in images])) if images else Path()
    named = [image.absolute().relative_to(common) if image.name in repeated else Path(image.name) for image in images]
    return list(zip(images, named, strict=True))


def _mask_name(relative: Path) -> Path:
    """`a/ct.nii.gz` -> `a/ct_seg.nii.gz`; an unknown suffix becomes `.nii.gz` (and is refused on reading)."""
    stem = image_stem(relative)
    suffix = relative.name[len(stem) :]
    return relative.with_name(f"{stem}_seg{suffix if suffix.lower() in IMAGE_SUFFIXES else '.nii.gz'}")


def infer(model: Model, jobs: list[Job], output: Path, progress: Progress, *, overwrite: bool = False) -> list[Outcome]:
    """Writes the mask of every job that is not done yet; one outcome for each, in order.

    A mask is done when it is there and not older than its CT. Failed ones are listed in `failures.csv`.

    Raises:
        OutputError: if masks cannot be written; finished ones stay.
        CtsegError: if `output` holds another model's masks and `overwrite` is off.
    """
    make_folder(output)
    _claim(output, model, jobs, overwrite)
    outcomes = []
    progress.start(f"segmenting with {model.recipe.name}", len(jobs))
    for job in jobs:
        outcomes.append(_run(model, job, progress, overwrite))
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
    if present.get("sha256") != model.sha256:
        if not overwrite:
            raise CtsegError(
                f"'{output}' holds masks of another model ({present.get('recipe')}, {present.get('model')}); "
                f"choose another --output, or --overwrite to replace them"
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


def _run(model: Model, job: Job, progress: Progress, overwrite: bool) -> Outcome:
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
