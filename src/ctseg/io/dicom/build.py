"""From a series whose problems are solved to a volume: duplicates out, pixels in, gaps and tilt repaired."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ctseg.errors import ImageError
from ctseg.io import MAX_VOXELS
from ctseg.io.dicom.geometry import at_one_position
from ctseg.io.dicom.pixels import pixel_digests
from ctseg.io.dicom.resample import shear_margins
from ctseg.io.dicom.series import SeriesGeometry, Slice
from ctseg.volume import Geometry


def without_duplicates(slices: Sequence[Slice]) -> list[Slice]:
    """One slice for every position.

    Raises:
        ImageError: if slices at one position hold different pixels.
    """
    runs = at_one_position(slices)
    shared = [run for run in runs if len(run) > 1]
    digests = pixel_digests([one for run in shared for one in run])
    differ = [run[0] for run in shared if len({(digests[one], one.rescale) for one in run}) > 1]
    if differ:
        place = float(differ[0].position_mm @ differ[0].normal)
        raise ImageError(
            f"{len(differ)} position(s) hold several different images, the first at {place:.1f} mm: acquisitions "
            f"mixed in one series; move those of one into a folder of their own"
        )
    return [run[0] for run in runs]


def planes_of(geometry: SeriesGeometry, close_up: bool) -> list[int]:
    """The z of every slice: consecutive, or with room for those that are missing."""
    steps = np.ones(len(geometry.along_mm), dtype=int)
    steps[0] = 0
    for index, count in () if close_up else geometry.missing:
        steps[index + 1] += count
    return [int(z) for z in np.cumsum(steps)]


def grid_of(slices: Sequence[Slice], geometry: SeriesGeometry, planes: Sequence[int], *, even: bool) -> Geometry:
    """The rectangular grid of slices at `planes`; `even` says that they keep the length of the stack.

    Raises:
        ImageError: if it has too many voxels.
    """
    first = slices[0]
    step_mm = float(geometry.along_mm[-1]) / planes[-1] if even else geometry.increment_mm or 0.0
    size = (*first.size, planes[-1] + 1)
    check_size(size)
    direction = np.stack([*first.axes, first.normal], axis=1)
    x, y, z = (float(p) for p in first.position_mm)
    return Geometry.from_parts(size, (*first.spacing_mm, step_mm), (x, y, z), direction)


def drift_pixels(slices: Sequence[Slice], geometry: SeriesGeometry) -> NDArray[np.float64]:
    """`(slices, 2)` how far each slice lies off the first one's normal, in its pixels along x and y."""
    drift: NDArray[np.float64] = np.round(geometry.drift_mm / np.array(slices[0].spacing_mm), 3)
    return drift


def grown(grid: Geometry, drift: NDArray[np.float64]) -> Geometry:
    """The grid with room for slices shifted by `drift`.

    Raises:
        ImageError: if it has too many voxels.
    """
    (left, right), (front, back) = shear_margins(drift)
    size = (grid.size[0] + left + right, grid.size[1] + front + back, grid.size[2])
    check_size(size)
    affine = grid.affine.copy()
    affine[:3, 3] -= affine[:3, :2] @ np.array([left, front], dtype=np.float64)
    return Geometry(size, affine)


def check_size(size: Sequence[int]) -> None:
    """Passes if a volume may be allocated.

    Raises:
        ImageError: if it has too many voxels.
    """
    if math.prod(size) > MAX_VOXELS:
        raise ImageError(f"at most {MAX_VOXELS} voxels, its positions need {math.prod(size):.3g}; they are damaged")
