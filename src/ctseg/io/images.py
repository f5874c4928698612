"""Reading and writing CT and labels: what every format has in common.

A file is trusted only when its header obeys every rule, its voxels are whole and its checksum is right. Nothing is
allocated before the header has passed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctseg.errors import ImageError, OutputError
from ctseg.files import atomic_path
from ctseg.io import Extent, Header, itk, nifti, read_array
from ctseg.manifest import IMAGE_SUFFIXES
from ctseg.scratch import extremes, in_slabs, new_array
from ctseg.volume import Geometry, LabelStream, Volume

SHEAR_TOLERANCE = 1e-3
"""Largest element of direction^T direction - I for axes that count as being at right angles."""

MAX_EXACT_SHIFT = 2**23
"""Integers of up to two bytes that are shifted by less are whole numbers in float32, too."""

_READERS: dict[str, Callable[[Path], Header]] = {
    ".nii.gz": nifti.read_header,
    ".nii": nifti.read_header,
    ".nrrd": itk.read_nrrd_header,
    ".mha": itk.read_mha_header,
}
LARGEST_HU = 1e6
"""In absolute value; larger ones would not be exact in float32, nor the voxels between them and their neighbours."""
WRITERS: dict[str, Callable[[Path, Volume | LabelStream], None]] = {
    ".nii.gz": partial(nifti.write, compressed=True),
    ".nii": partial(nifti.write, compressed=False),
    ".nrrd": itk.write_nrrd,
    ".mha": itk.write_mha,
}
OTHER_SUFFIXES = {
    **dict.fromkeys((".hdr", ".img", ".hdr.gz", ".img.gz"), "a .hdr/.img pair; convert it to .nii.gz"),
    ".nhdr": "a header without its voxels; convert it to .nrrd",
    ".mhd": "a header without its voxels; convert it to .mha",
    ".dcm": "one DICOM slice; `ctseg convert` reads the folder of its series",
}


def read_extent(path: Path) -> Extent:
    """What `read_image` will take; only the header is read and checked.

    Integers that are shifted are taken to keep their width, as those of CT do.

    Raises:
        ImageError: as `read_image`, for what the header shows.
    """
    with read_errors(path):
        header = checked_header(path)
    stored = held = header.dtype.itemsize
    if (header.slope, header.intercept) != (1.0, 0.0):
        shifted = header.slope == 1.0 and header.intercept.is_integer() and header.dtype.kind in "iu"
        held = max(stored, 2) if shifted else 4
    voxels = math.prod(header.geometry.size)
    in_place = held == stored and (held == 4 or header.dtype.kind in "iu")
    return Extent(header.geometry, voxels * held, 0 if in_place else voxels * stored, streams=can_stream(header))


def can_stream(header: Header) -> bool:
    """Whether every plane can be turned into Hounsfield units by itself, with the values that `read_image` gives."""
    shifted = header.slope == 1.0 and header.intercept != 0.0 and header.intercept.is_integer()
    if not shifted or header.dtype.kind == "f":
        return True
    return header.dtype.itemsize <= 2 and abs(header.intercept) < MAX_EXACT_SHIFT


def read_image(path: Path, scratch: Path | None = None) -> Volume:
    """The CT in a file: Hounsfield units, as the stored integers where scaling allows, else float32.

    Args:
        path: The file.
        scratch: Folder on whose disk the voxels are to lie, see `ctseg.scratch`; None: in memory.

    Raises:
        ImageError: if the file cannot be trusted or is not a CT; the message names every broken rule of its header.
        OutputError: if there is no room in `scratch`.
    """
    volume = _read(path, scratch)
    check_ct(volume, path)
    return volume


def read_labels(path: Path) -> Volume:
    """The label map in a file, as uint8; floats are accepted where every one is a whole number.

    Raises:
        ImageError: if the file cannot be trusted or a value is not a whole number in 0..255.
    """
    volume = _read(path)
    array = volume.array
    if array.dtype == np.uint8:
        return volume
    with np.errstate(invalid="ignore"):
        labels = array.astype(np.uint8)
        wrong = np.not_equal(labels, array)
    if wrong.any():
        raise ImageError(
            f"cannot read '{path}': labels must be whole numbers in 0..255, got {np.count_nonzero(wrong)} voxels that "
            f"are not, the first is {array.T[wrong.T][0]}; is this the label map?"
        )
    return Volume(labels, volume.geometry)


def read_geometry(path: Path) -> Geometry:
    """The grid of the volume in a file; only the header is read and checked.

    Raises:
        ImageError: as `read_image`, for what the header shows.
    """
    with read_errors(path):
        return checked_header(path).geometry


def write_labels(path: Path, labels: NDArray[np.uint8] | LabelStream, geometry: Geometry) -> None:
    """Writes a label map on the grid `geometry`, as `write_image` does; it may be made only now, piece by piece.

    Raises:
        OutputError: if the suffix is unknown or the file cannot be written.
        ValueError: if `labels` is not uint8 or not of the size of `geometry`.
    """
    if isinstance(labels, LabelStream):
        if labels.geometry.size != geometry.size:
            raise ValueError(f"labels of {labels.geometry.size} do not fit a grid of {geometry.size}")
        _write(path, replace(labels, geometry=geometry))
        return
    if labels.dtype != np.uint8 or labels.shape != geometry.size:
        raise ValueError(f"labels must be uint8 of size {geometry.size}, got {labels.dtype} of {labels.shape}")
    write_image(path, Volume(labels, geometry))


def write_image(path: Path, volume: Volume) -> None:
    """Writes a volume in the format of the suffix of `path`, its voxels in their own type; whole or not at all.

    Nothing but the grid and the voxels is written: no names, dates or descriptions.

    Raises:
        OutputError: if the suffix is unknown or the file cannot be written.
        ValueError: if the array is not of integers or floats of 1 to 8 bytes, or not of the size of its grid.
    """
    array = volume.array
    if array.dtype.kind not in "iuf" or array.dtype == np.float16 or array.dtype.itemsize > 8:
        raise ValueError(f"voxels must be integers or floats of 1 to 8 bytes, got {array.dtype}")
    if array.shape != volume.geometry.size:
        raise ValueError(f"an array of size {array.shape} does not fit its grid of {volume.geometry.size}")
    _write(path, volume)


def _write(path: Path, volume: Volume | LabelStream) -> None:
    suffix = _suffix(path)
    if suffix not in WRITERS:
        raise OutputError(f"cannot write '{path}': its suffix must be one of {', '.join(IMAGE_SUFFIXES)}; rename it")
    with atomic_path(path) as temporary:
        WRITERS[suffix](temporary, volume)


def check_ct(volume: Volume, path: Path) -> None:
    """Passes if every voxel is a number and not all are the same.

    Raises:
        ImageError: naming `path`, if the volume cannot be a CT.
    """
    with np.errstate(invalid="ignore"):
        low, high = extremes(volume.array)
    bad = 0
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = sum(slab.size - np.count_nonzero(np.isfinite(slab)) for slab in in_slabs(volume.array))
    check_values(low, high, bad, path)


def check_values(low: Any, high: Any, bad: int, path: Path) -> None:
    """Passes if values from `low` to `high`, and `bad` that are not finite, can be those of a CT.

    Raises:
        ImageError: as `check_ct`.
    """
    if bad:
        raise ImageError(
            f"cannot read '{path}': every voxel must be a number, got {bad} NaN or infinite; export it again"
        )
    if max(-float(low), float(high)) > LARGEST_HU:
        raise ImageError(
            f"cannot read '{path}': expected Hounsfield units of at most {LARGEST_HU:g}, got voxels from {low:.6g} to "
            f"{high:.6g}; put -1024 where they stand for nothing"
        )
    if low == high:
        raise ImageError(f"cannot read '{path}': every voxel is {low}: not a CT; is this the right file?")


def checked_header(path: Path) -> Header:
    """The header of an image file that obeys every rule.

    Raises:
        ImageError: naming every rule it breaks, but not the file: see `read_errors`.
        OSError: if the file cannot be read.
    """
    suffix = _suffix(path)
    if path.is_dir():
        raise ImageError("it must be a file, got a folder; name one image, or make one of DICOM by `ctseg convert`")
    if suffix not in _READERS:
        what = OTHER_SUFFIXES.get(suffix)
        reason = f"'{suffix}' is {what}" if what else "its suffix is unknown; convert it"
        raise ImageError(f"{reason} (known: {', '.join(IMAGE_SUFFIXES)})")
    if path.exists() and not path.is_file():
        raise ImageError("it must be a file, got a device or pipe; name one image")
    if path.stat().st_size == 0:
        raise ImageError("the file is empty; copy it again from its source")
    header = _READERS[suffix](path)
    problems = [*header.problems, *grid_problems(header.geometry)]
    if problems:
        raise ImageError("; ".join(problems))
    return header


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turns what reading can meet into an ImageError that names `path`; numpy is silent about NaN in headers."""
    try:
        with np.errstate(all="ignore"):
            yield
    except ImageError as error:
        raise ImageError(f"cannot read '{path}': {error}") from error
    except OSError as error:
        raise ImageError(
            f"cannot read '{path}': {error.strerror or error}; check the path and its permissions"
        ) from error
    except MemoryError as error:
        raise ImageError(f"cannot read '{path}': not enough memory for its voxels; free some or crop it") from error


def grid_problems(geometry: Geometry) -> list[str]:
    """A line for each rule the grid breaks: finite, positive spacing, right angles. Left-handed is fine."""
    if not np.isfinite(geometry.affine).all():
        return ["the affine must be finite, got NaN or infinity; the header is damaged"]
    spacing_mm = np.array(geometry.spacing_mm)
    if not ((spacing_mm > 0) & np.isfinite(spacing_mm)).all():
        return [f"spacing must be positive, got {' x '.join(map(str, spacing_mm))} mm; the header is damaged"]
    direction = geometry.direction
    shear = float(np.abs(direction.T @ direction - np.eye(3)).max())
    if not shear <= SHEAR_TOLERANCE:
        return [
            f"axes must be at right angles, got a shear of {shear:.3g} (at most {SHEAR_TOLERANCE}); resample it first"
        ]
    return []


def _read(path: Path, scratch: Path | None = None) -> Volume:
    with read_errors(path):
        header = checked_header(path)
        array = read_array(path, header, scratch)
        return Volume(_scaled(array, header.slope, header.intercept, scratch), header.geometry)


def _suffix(path: Path) -> str:
    """The known suffix a name ends in, else whatever follows its last dot; lower case."""
    name = path.name.lower()
    known = (*IMAGE_SUFFIXES, *OTHER_SUFFIXES)
    return next((suffix for suffix in known if name.endswith(suffix)), path.suffix.lower())


def _scaled(array: NDArray[Any], slope: float, intercept: float, scratch: Path | None) -> NDArray[Any]:
    """Array x slope + intercept: integers where slope is 1 and the intercept whole, if the sums fit; else float32."""
    if (slope, intercept) == (1.0, 0.0):
        return array
    if slope == 1.0 and intercept.is_integer() and np.issubdtype(array.dtype, np.integer):
        low, high = (int(value) + int(intercept) for value in extremes(array))
        for dtype in (array.dtype, np.dtype(np.int16), np.dtype(np.int32)):
            if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
                return _shifted(array, int(intercept), dtype, scratch)
    scaled = array if array.dtype == np.float32 else new_array(array.T.shape, np.float32, scratch).T
    for stored, values in zip(in_slabs(array), in_slabs(scaled), strict=True):
        values[...] = stored
        values *= np.float32(slope)
        values += np.float32(intercept)
    return scaled


def _shifted(array: NDArray[Any], intercept: int, dtype: np.dtype[Any], scratch: Path | None) -> NDArray[Any]:
    """Integers plus `intercept` as `dtype`, in place where the width allows; wrapping is exact if the sums fit."""
    in_place = dtype.itemsize == array.dtype.itemsize
    shifted = array.view(dtype) if in_place else new_array(array.T.shape, dtype, scratch).T
    wrap = np.array(intercept % 2 ** (8 * dtype.itemsize), dtype=np.uint64).astype(dtype)
    for stored, values in zip(in_slabs(array), in_slabs(shifted), strict=True):
        if not in_place:
            values[...] = stored
        values += wrap
    return shifted
