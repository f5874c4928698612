"""What the files of a data set hold, as far as checks need it: read once, in parallel, and remembered.

Facts depend on the files alone, not on splits or recipes. They are kept in one small file for each case, and read
again only when an image or label has changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctseg.errors import ImageError, Stopped
from ctseg.files import make_folder, write_json
from ctseg.io.images import read_geometry, read_image, read_labels
from ctseg.manifest import Case
from ctseg.progress import Progress
from ctseg.volume import Geometry, Volume, to_ras
from ctseg.workers import in_parallel, num_workers

FORMAT = 1
AIR_HU = (-1100, -200)
"""Voxels between these count as air: padding outside the field of view lies lower, fat higher."""
TISSUE_HU = (-200, 300)
"""Voxels between these count as soft tissue: fat, water, blood, organs."""
BYTES_PER_VOXEL = 12
"""Memory that a case takes while it is inspected: an image of 4 bytes, its copy while it is scaled, its labels."""


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """What an image or a label file holds.

    Attributes:
        missing: True where there is no such file.
        error: Why it cannot be read, with its path; the other attributes count only where this is empty.
        size: Voxels along x, y, z.
        affine: Rows of the 4x4 affine, LPS.
        digest: Of the voxels in RAS order, whatever their file format, compression, number type and axis order.
        low, high: Smallest and largest value.
        air_share: Share of voxels in AIR_HU.
        tissue_share: Share of voxels in TISSUE_HU.
        values: Values above 0 that occur in a label map.
    """

    missing: bool = False
    error: str = ""
    size: tuple[int, int, int] = (0, 0, 0)
    affine: tuple[tuple[float, ...], ...] = ()
    digest: str = ""
    low: float = 0.0
    high: float = 0.0
    air_share: float = 0.0
    tissue_share: float = 0.0
    values: tuple[int, ...] = ()

    @property
    def geometry(self) -> Geometry:
        """The grid."""
        return Geometry(self.size, np.array(self.affine))

    @property
    def is_readable(self) -> bool:
        """True where the other facts count."""
        return not self.missing and not self.error


@dataclass(frozen=True)
class CaseFacts:
    """What the files of a case hold."""

    image: FileFacts
    label: FileFacts | None


def inspect_cases(
    cases: tuple[Case, ...],
    folder: Path,
    progress: Progress,
    stop_requested: Callable[[], bool] = lambda: False,
    workers: int | None = None,
) -> dict[str, CaseFacts]:
    """The facts of every case, by its name.

    Args:
        cases: All cases, each name once.
        folder: Where facts are kept between two calls.
        progress: Told of every case.
        stop_requested: Asked before each case.
        workers: Cases at once; default as many as CPUs and memory allow.

    Raises:
        Stopped: after a stop request; what was read is kept.
    """
    make_folder(folder)
    facts: dict[str, CaseFacts] = {}
    progress.start("checking", len(cases))
    at_once = num_workers([_memory_bytes(case) for case in cases], workers)
    for case, found in in_parallel(partial(_inspect, folder), cases, at_once, stop_requested):
        facts[case.name] = found
        progress.advance(case.name)
    if len(facts) < len(cases):
        raise Stopped(f"stopped by a signal, {len(facts)} of {len(cases)} cases are checked; the same command goes on")
    progress.finish()
    return facts


def _memory_bytes(case: Case) -> int:
    try:
        return int(np.prod(read_geometry(case.image).size, dtype=np.int64)) * BYTES_PER_VOXEL
    except ImageError:
        return 0  # not read beyond its header


def _inspect(folder: Path, case: Case) -> CaseFacts:
    """The facts of a case, from its file in `folder` if its image and label are as they were then."""
    files = [file for file in (case.image, case.label) if file is not None]
    source = [FORMAT, [_state(file) for file in files]]
    names = json.dumps([str(file.absolute()) for file in files])
    kept = folder / f"{hashlib.sha256(names.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}.json"
    facts = _read_kept(kept, source)
    if facts is None:
        facts = CaseFacts(_facts_of_image(case.image), None if case.label is None else _facts_of_label(case.label))
        write_json(kept, {"source": source, **dataclasses.asdict(facts)})
    return facts


def _state(file: Path) -> list[int] | None:
    """What changes whenever the file does; None where it is missing."""
    try:
        status = file.stat()
    except (OSError, ValueError):
        return None
    return [status.st_size, status.st_mtime_ns]


def _read_kept(path: Path, source: list[Any]) -> CaseFacts | None:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["source"] != source:
            return None
        return CaseFacts(_from_json(kept["image"]), None if kept["label"] is None else _from_json(kept["label"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # missing or damaged: the case is read again


def _from_json(data: dict[str, Any]) -> FileFacts:
    x, y, z = data["size"]
    affine = tuple(tuple(row) for row in data["affine"])
    return FileFacts(**{**data, "size": (x, y, z), "affine": affine, "values": tuple(data["values"])})


def _facts_of_image(path: Path) -> FileFacts:
    if _state(path) is None:
        return FileFacts(missing=True)
    try:
        volume = read_image(path)
    except ImageError as error:
        return FileFacts(error=str(error))
    array = _canonical(volume.array)
    digest, num_air, num_tissue = _new_digest(Volume(array, volume.geometry)), 0, 0
    for plane in _planes(Volume(array, volume.geometry)):
        digest.update(plane.data)
        num_air += _count_between(plane, AIR_HU)
        num_tissue += _count_between(plane, TISSUE_HU)
    return FileFacts(
        size=volume.geometry.size,
        affine=tuple(tuple(row) for row in volume.geometry.affine.tolist()),
        digest=digest.hexdigest(),
        low=float(array.min()),
        high=float(array.max()),
        air_share=num_air / array.size,
        tissue_share=num_tissue / array.size,
    )


def _facts_of_label(path: Path) -> FileFacts:
    if _state(path) is None:
        return FileFacts(missing=True)
    try:
        volume = read_labels(path)
    except ImageError as error:
        return FileFacts(error=str(error))
    digest, counts = _new_digest(volume), np.zeros(256, dtype=np.int64)
    for plane in _planes(volume):
        digest.update(plane.data)
        counts += np.bincount(plane.reshape(-1), minlength=256)
    return FileFacts(
        size=volume.geometry.size,
        affine=tuple(tuple(row) for row in volume.geometry.affine.tolist()),
        digest=digest.hexdigest(),
        high=float(volume.array.max()),
        values=tuple(int(value) for value in np.flatnonzero(counts[1:]) + 1),
    )


def _count_between(plane: NDArray[Any], bounds: tuple[int, int]) -> int:
    return int(np.count_nonzero((plane > bounds[0]) & (plane < bounds[1])))


def _canonical(array: NDArray[Any]) -> NDArray[Any]:
    """The same values in one type however they were stored: int16 where that holds them all, else float32."""
    if array.dtype == np.int16:
        return array
    if array.min() >= -(2**15) and array.max() < 2**15:
        whole = array.astype(np.int16)
        if array.dtype.kind in "iu" or np.array_equal(whole, array):
            return whole
    return array.astype(np.float32)


def _new_digest(volume: Volume) -> Any:
    """A hash that has taken in what `_planes` does not show: the type and the size in RAS order."""
    return hashlib.sha256(f"{volume.array.dtype} {to_ras(volume).array.shape}".encode())


def _planes(volume: Volume) -> Iterator[NDArray[Any]]:
    """The volume's planes from foot to head, x to the right and y to the front, each contiguous."""
    array = to_ras(volume).array
    for z in range(array.shape[2]):
        yield np.ascontiguousarray(array[:, :, z].T)
