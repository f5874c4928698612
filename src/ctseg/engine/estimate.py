"""What preparing cases will take, by their headers: told, and refused where the disk has less, before hours of work."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ctseg.errors import ImageError, OutputError
from ctseg.io.images import read_geometry
from ctseg.manifest import Case
from ctseg.preprocess import network_geometry
from ctseg.progress import Progress
from ctseg.specs import Preprocess

DISK_BYTES_PER_VOXEL = 7
"""Of the network's grid at most: image 2, label 1, and the 4 of its index if it is foreground."""
MEMORY_BYTES_PER_VOXEL = (12, 16)
"""Of the CT's grid (see `dataset.inspection`) and of the network's: float32, its crop as float16, label, index."""


@dataclass(frozen=True)
class Estimate:
    """What preparing a case takes at most, by its header: bytes on disk, where nothing is cropped, and of memory."""

    disk_bytes: int
    memory_bytes: int


def estimate(case: Case, spec: Preprocess) -> Estimate:
    """What preparing a case takes; nothing where its header cannot be read, as it then fails at once."""
    try:
        source = read_geometry(case.image)
        grid = network_geometry(source, spec)
    except ImageError:
        return Estimate(0, 0)
    voxels, grid_voxels = math.prod(source.size), math.prod(grid.size)
    per_voxel, per_grid_voxel = MEMORY_BYTES_PER_VOXEL
    return Estimate(grid_voxels * DISK_BYTES_PER_VOXEL, voxels * per_voxel + grid_voxels * per_grid_voxel)


def check_space(folder: Path, estimates: Sequence[Estimate], progress: Progress) -> None:
    """Tells what the cases need at most; raises OutputError where the disk has less."""
    if not estimates:
        return
    needed, free = sum(e.disk_bytes for e in estimates), shutil.disk_usage(folder).free
    text = f"{len(estimates)} cases to prepare need up to {needed / 1e9:.2f} GB, free are {free / 1e9:.2f} GB"
    if needed > free:
        raise OutputError(f"'{folder}': {text}; free space or name another disk with --prepared")
    progress.note(text)
