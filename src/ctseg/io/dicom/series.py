"""What a DICOM series is once its headers have been read: slices in order, geometry, problems."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray

from ctseg.io.dicom.files import Source
from ctseg.io.dicom.headers import Header


@dataclass(frozen=True, eq=False, kw_only=True)
class Slice:
    """One CT image: a file, or one frame of a multi-frame file.

    Attributes:
        file: What its file says; the frames of a file share it.
        frame: 0-based number of the frame, None in a file of one image.
        position_mm: `(3,)` LPS, centre of the first voxel.
        axes: `(2, 3)` unit vectors of increasing column index (x) and row index (y).
        spacing_mm: Between columns (x), between rows (y).
        size: Columns, rows.
        rescale: Slope and intercept: stored value x slope + intercept = Hounsfield units.
    """

    file: Header
    frame: int | None
    position_mm: NDArray[np.float64]
    axes: NDArray[np.float64]
    spacing_mm: tuple[float, float]
    size: tuple[int, int]
    rescale: tuple[float, float]

    @property
    def source(self) -> Source:
        """Where its bytes are."""
        return self.file.source

    @property
    def header(self) -> pydicom.Dataset:
        """The file's data set without its pixels; read when first asked for."""
        return self.file.dataset

    @property
    def normal(self) -> NDArray[np.float64]:
        """`(3,)` unit vector x cross y."""
        return np.cross(self.axes[0], self.axes[1])

    def value(self, keyword: str) -> Any:
        """The value of a tag: of this frame, else shared by all frames, else of the file; or None."""
        return self.file.value(keyword, self.frame)


@dataclass(frozen=True)
class Finding:
    """What is odd or wrong about a series.

    Attributes:
        code: One word for tables: "gaps", "tilt", "spacing", ...
        text: What it is and, where it keeps the series from being read, what to do.
    """

    code: str
    text: str


@dataclass(frozen=True, eq=False, kw_only=True)
class SeriesGeometry:
    """How the slices of a series lie.

    Attributes:
        along_mm: `(slices,)` distance of each slice from the first along the normal, ascending.
        drift_mm: `(slices, 2)` how far each slice lies off the first one's normal, along x and y.
        increment_mm: The usual distance between neighbours (median); None for a single slice.
        missing: For each gap, how many slices are missing after which slice: (index, number).
        tilt_degrees: Angle between the normal and the line through the slices.
    """

    along_mm: NDArray[np.float64]
    drift_mm: NDArray[np.float64]
    increment_mm: float | None
    missing: tuple[tuple[int, int], ...]
    tilt_degrees: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Series:
    """Slices of one acquisition, sorted along their normal x cross y, ascending.

    Attributes:
        number: 1-based place in the list, "#3" in a rule.
        uid: SeriesInstanceUID: an identifier, not for logs and names.
        kind: "CT", or what else it is: "localizer", "secondary capture", "MR", ...
        slices: Sorted; duplicates with equal pixels are dropped when the series is read.
        geometry: How they lie; None where that is unknown.
        problems: What keeps it from being read as it is; empty for a sound series.
        notes: What is odd but does no harm.
    """

    number: int
    uid: str
    kind: str
    slices: tuple[Slice, ...]
    geometry: SeriesGeometry | None
    problems: tuple[Finding, ...] = ()
    notes: tuple[Finding, ...] = ()

    def value(self, keyword: str) -> Any:
        """The value of a tag in the first slice, or None."""
        return self.slices[0].value(keyword)

    @property
    def is_ct(self) -> bool:
        """True for what can become a CT volume."""
        return self.kind == "CT"

    @property
    def spacing_mm(self) -> tuple[float, float, float | None]:
        """Between columns, rows and slices."""
        return *self.slices[0].spacing_mm, self.geometry.increment_mm if self.geometry else None

    def __iter__(self) -> Iterator[Slice]:
        return iter(self.slices)

    def __len__(self) -> int:
        return len(self.slices)
