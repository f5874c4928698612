"""A CT volume: an array and where it lies in the patient. The one place of axis order.

Conventions, everywhere in ctseg:

- Arrays are indexed `[x, y, z]`: the file's first, second, third axis (as nibabel and MONAI do). Files store x
  fastest, so such an array is usually Fortran-ordered; only `io` knows how a format lays out its bytes.
- Patient space is LPS in millimetres (x to the left, y to the back, z to the head), as in DICOM and ITK.
- Axis codes name the direction an axis points to: "RAS" is an array whose x grows to the patient's right.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

GEOMETRY_TOLERANCE_VOXELS = 0.05
"""Two grids are one grid when no corner voxel lies further apart than this share of a voxel."""


@dataclass(frozen=True, eq=False)
class Geometry:
    """A voxel grid in the patient.

    Attributes:
        size: Number of voxels along x, y, z.
        affine: 4x4 float64; (i, j, k, 1) -> millimetres in LPS.
    """

    size: tuple[int, int, int]
    affine: NDArray[np.float64]

    @classmethod
    def from_parts(
        cls,
        size: tuple[int, int, int],
        spacing_mm: tuple[float, float, float],
        origin_mm: tuple[float, float, float],
        direction: NDArray[np.float64],
    ) -> Geometry:
        """The grid with voxel (0, 0, 0) at `origin_mm` and axes along the columns of `direction` (3x3, LPS)."""
        affine = np.eye(4)
        affine[:3, :3] = np.asarray(direction, dtype=np.float64) * np.asarray(spacing_mm, dtype=np.float64)
        affine[:3, 3] = origin_mm
        return cls(size, affine)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between voxel centres along x, y, z."""
        x, y, z = np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0))
        return float(x), float(y), float(z)

    @property
    def origin_mm(self) -> tuple[float, float, float]:
        """Centre of voxel (0, 0, 0) in LPS."""
        x, y, z = self.affine[:3, 3]
        return float(x), float(y), float(z)

    @property
    def direction(self) -> NDArray[np.float64]:
        """3x3; column n is the unit vector of array axis n in LPS."""
        axes: NDArray[np.float64] = self.affine[:3, :3] / np.asarray(self.spacing_mm)
        return axes

    @property
    def affine_ras(self) -> NDArray[np.float64]:
        """The affine in RAS millimetres, as NIfTI files and MONAI hold it."""
        return np.diag([-1.0, -1.0, 1.0, 1.0]) @ self.affine

    @property
    def axis_codes(self) -> str:
        """Three letters, one per axis: the direction it points to, e.g. "LPS"."""
        order = orientation_to_ras(self)
        letters = ["LR", "PA", "IS"]
        return "".join(letters[axis][int(sign > 0)] for axis, sign in order)

    @property
    def voxel_volume_ml(self) -> float:
        """Volume of one voxel in millilitres."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000.0

    def agrees_with(self, other: Geometry) -> bool:
        """True when both are the same grid: equal size, corners within GEOMETRY_TOLERANCE_VOXELS."""
        return self.size == other.size and self.corner_distance_voxels(other) <= GEOMETRY_TOLERANCE_VOXELS

    def corner_distance_voxels(self, other: Geometry) -> float:
        """Largest distance between equal corners of the two grids, in the smallest spacing of this one."""
        last = np.asarray(self.size) - 1
        corners = np.array(np.meshgrid(*[(0, n) for n in last], indexing="ij")).reshape(3, -1)
        apart_mm = (self.affine - other.affine) @ np.vstack([corners, np.ones(corners.shape[1])])
        return float(np.sqrt((apart_mm[:3] ** 2).sum(axis=0)).max() / min(self.spacing_mm))


@dataclass(frozen=True, eq=False)
class Volume:
    """A scalar volume and its grid.

    Attributes:
        array: `[x, y, z]`, any integer or float type, any memory layout; Hounsfield units for CT, integers for labels.
        geometry: The grid; `geometry.size == array.shape`.
    """

    array: NDArray[Any]
    geometry: Geometry

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of its voxels."""
        return self.array.dtype


@dataclass(frozen=True, eq=False)
class LabelStream:
    """A label map that is written while it is made.

    Attributes:
        geometry: Its grid.
        pieces: uint8 `[z, y, x]` of the next planes along z, from the first to the last; they come once.
    """

    geometry: Geometry
    pieces: Iterator[NDArray[np.uint8]]

    @property
    def dtype(self) -> np.dtype[Any]:
        """As of a volume."""
        return np.dtype(np.uint8)


class PlaneStream(Protocol):
    """A CT whose planes across its third axis come one after another, in Hounsfield units; see `ctseg.io.stream`."""

    geometry: Geometry

    def planes(self, first: int, stop: int) -> NDArray[Any]:
        """Planes `first` to `stop` - 1 as `[z, y, x]`; neither may lie before that of the last call."""

    def finish(self) -> None:
        """Raises ImageError if what came was no CT; nothing made of it may be used before."""


def orientation_to_ras(geometry: Geometry) -> list[tuple[int, int]]:
    """For each array axis, the patient axis (0 R-L, 1 A-P, 2 S-I) it follows and +1 if towards R, A, S, else -1.

    Oblique grids are assigned by nibabel's `io_orientation`, which MONAI's Orientation uses too.
    """
    from nibabel.orientations import io_orientation

    return [(int(axis), int(sign)) for axis, sign in io_orientation(geometry.affine_ras)]


def to_ras(volume: Volume) -> Volume:
    """The same voxels with axes reordered and flipped to point to R, A, S as nearly as possible: a view, no copy."""
    order = orientation_to_ras(volume.geometry)
    source_axes = [next(a for a, (ras_axis, _) in enumerate(order) if ras_axis == n) for n in range(3)]
    array = volume.array.transpose(source_axes)
    permute = np.zeros((4, 4))
    permute[3, 3] = 1.0
    for new, old in enumerate(source_axes):
        sign = order[old][1]
        permute[old, new] = sign
        if sign < 0:
            permute[old, 3] = volume.geometry.size[old] - 1
    flips = tuple(slice(None, None, order[old][1]) for old in source_axes)
    array = array[flips]
    x, y, z = array.shape
    return Volume(array, Geometry((x, y, z), volume.geometry.affine @ permute))
