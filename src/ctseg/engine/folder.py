"""What a folder of masks says about itself: which model they are of, and which CTs failed."""

from __future__ import annotations

import csv
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ctseg.dicom_jobs import STRICT
from ctseg.engine.model import Model
from ctseg.errors import CtsegError
from ctseg.files import output_errors, write_csv, write_json
from ctseg.jobs import MASKS_RECORD, Job, Shard, is_mask_name
from ctseg.provenance import differences, read_object


def claim(output: Path, model: Model, jobs: list[Job], made_with: dict[str, Any], overwrite: bool) -> None:
    """Records how the folder's masks are made, so that those of two models or ways never mix when a run is cut off.

    Raises:
        CtsegError: if they were made otherwise, unless `overwrite` is on and `jobs` replace them all.
        OutputError: if nothing can be written.
    """
    record = {"recipe": model.recipe.name, "model": model.path.name, "sha256": model.sha256}
    present = read_object(output / MASKS_RECORD)
    if not present:  # masks of unknown origin are not ours
        present = {} if any(job.mask.exists() for job in jobs) else record | made_with
    different = differences({"fast": False} | present, made_with, STRICT)  # an older folder does not say
    if present.get("sha256") != model.sha256:
        whose = ", ".join(str(present[key]) for key in ("recipe", "model") if key in present)
        _replace(output, jobs, f"masks of another model ({whose or 'of unknown origin'})", overwrite)
        present = {}
    elif different:
        _replace(output, jobs, f"masks made with other options ({', '.join(different)})", overwrite)
    write_json(output / MASKS_RECORD, present | record | made_with)


def _replace(output: Path, jobs: list[Job], what: str, overwrite: bool) -> None:
    """Removes the masks of `jobs`, if that is allowed and leaves none of the others."""
    if not overwrite:
        raise CtsegError(
            f"'{output}' holds {what}; choose another --output, or --overwrite (without --shard and --gpus) to "
            f"replace them"
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


def record_failure(path: Path, image: str, error: str) -> None:
    """Brings `failures.csv` up to date after each file: its row comes, goes or stays; without rows there is no file."""
    before = _read_failures(path)
    rows = [row for row in before if row["image"] != image]
    if error:
        rows.append({"image": image, "error": error})
    if rows and rows != before:
        write_csv(path, ("image", "error"), rows)
    elif not rows:
        path.unlink(missing_ok=True)


def drop_old_failures(output: Path, shard: Shard, images: Collection[str]) -> None:
    """Takes these CTs, which a run has just done or listed, off the lists of runs with another number of parts."""
    for path in output.glob("failures*.csv"):
        match = re.fullmatch(r"failures(?:-\d+-of-(\d+))?\.csv", path.name)
        if match is None or int(match[1] or 1) == shard.count:
            continue
        before = _read_failures(path)
        rows = [row for row in before if row["image"] not in images]
        if not rows and before:
            path.unlink(missing_ok=True)
        elif rows != before:
            write_csv(path, ("image", "error"), rows)


def _read_failures(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [{"image": row["image"], "error": row["error"]} for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, csv.Error):
        return []
