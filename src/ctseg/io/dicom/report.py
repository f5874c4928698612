"""What was found and done when a series became a volume: plain data, without identifiers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ctseg.io.dicom.frames import LONGEST_TEXT, integer, numbers, texts
from ctseg.io.dicom.series import Finding, Series, SeriesGeometry
from ctseg.progress import printable
from ctseg.volume import Geometry

OBLIQUE_FROM_DEGREES = 30.0
"""A normal further from the patient's axes makes a series oblique; gantries tilt by at most 30 degrees."""


@dataclass(frozen=True, kw_only=True)
class GeometryReport:
    """What someone who uses the volume should know about the series behind it.

    Attributes:
        size: Voxels along x, y, z.
        spacing_mm: Between their centres.
        origin_mm: Centre of voxel (0, 0, 0), LPS.
        direction: 3x3; column n is the unit vector of axis n, LPS.
        orientation: "axial", "coronal", "sagittal" or "oblique".
        num_slices: Source images in the volume.
        increments_mm: Smallest, usual and largest distance between neighbouring source images.
        tilt_degrees: Between the normal and the line through the slices, before any repair.
        sheared: Whether slices were shifted in their plane to undo the tilt.
        dropped_duplicates: How many images equal to another at their position were left out.
        filled_slices: z of every slice that was interpolated.
        closed_up_mm: By how much the far end lies nearer than it should because gaps were ignored; 0 without.
        padding_voxels: How many voxels hold the series' padding value; they keep it.
        hu_range: Smallest and largest value.
        manufacturer, model, kernel, kvp, slice_thickness_mm: As the headers say.
        repaired: The problems that the policies solved.
        notes: What is odd but does no harm.
    """

    size: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float]
    direction: list[list[float]]
    orientation: str | None
    num_slices: int
    increments_mm: tuple[float, float, float]
    tilt_degrees: float
    sheared: bool
    dropped_duplicates: int
    filled_slices: tuple[int, ...]
    closed_up_mm: float
    padding_voxels: int
    hu_range: tuple[float, float]
    manufacturer: str | None
    model: str | None
    kernel: str | None
    kvp: float | None
    slice_thickness_mm: float | None
    repaired: tuple[Finding, ...]
    notes: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as data for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Repairs:
    """What was done to make the volume; see GeometryReport."""

    sheared: bool
    dropped_duplicates: int
    filled_slices: Sequence[int]
    closed_up_mm: float
    padding_voxels: int
    hu_range: tuple[float, float]


def make_report(series: Series, grid: Geometry, geometry: SeriesGeometry, repairs: Repairs) -> GeometryReport:
    """The report of a volume on `grid` that was made of a series whose slices lie as `geometry` says."""
    steps = np.diff(geometry.along_mm)
    return GeometryReport(
        size=grid.size,
        spacing_mm=grid.spacing_mm,
        origin_mm=grid.origin_mm,
        direction=grid.direction.tolist(),
        orientation=orientation(series),
        num_slices=len(geometry.along_mm),
        increments_mm=(float(steps.min()), float(geometry.increment_mm or 0.0), float(steps.max())),
        tilt_degrees=geometry.tilt_degrees,
        sheared=repairs.sheared,
        dropped_duplicates=repairs.dropped_duplicates,
        filled_slices=tuple(repairs.filled_slices),
        closed_up_mm=repairs.closed_up_mm,
        padding_voxels=repairs.padding_voxels,
        hu_range=repairs.hu_range,
        manufacturer=text(series, "Manufacturer"),
        model=text(series, "ManufacturerModelName"),
        kernel=text(series, "ConvolutionKernel"),
        kvp=number(series, "KVP"),
        slice_thickness_mm=number(series, "SliceThickness"),
        repaired=series.problems,
        notes=series.notes,
    )


def orientation(series: Series) -> str | None:
    """The word "axial", "coronal" or "sagittal" by the normal, "oblique" if it is near none; None if unknown."""
    normal = np.abs(series.slices[0].normal)
    if np.isnan(normal).any():
        return None
    if float(np.degrees(np.arccos(min(1.0, normal.max())))) > OBLIQUE_FROM_DEGREES:
        return "oblique"
    return ("sagittal", "coronal", "axial")[int(normal.argmax())]


def text(series: Series, keyword: str) -> str | None:
    """The words of a tag of the first slice, joined, printable and bounded; None without."""
    words = " ".join(texts(series.value(keyword)))
    return printable(words)[:LONGEST_TEXT].strip() or None


def number(series: Series, keyword: str) -> float | None:
    """The number of a tag of the first slice, or None."""
    value = float(numbers(series.value(keyword), 1)[0])
    return None if np.isnan(value) else value


def whole_number(series: Series, keyword: str) -> int | None:
    """The whole number of a tag of the first slice, or None."""
    return integer(series.value(keyword))
