"""CT volumes from DICOM: find the series, choose one, read it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.uid import UID

from ctseg.errors import CtsegError, ImageError, list_problems
from ctseg.io import Extent
from ctseg.io.dicom.build import drift_pixels, grid_of, grown, planes_of, without_duplicates
from ctseg.io.dicom.files import Source, list_sources
from ctseg.io.dicom.frames import CT_CLASSES, LONGEST_TEXT, slices_of
from ctseg.io.dicom.geometry import at_one_position, measure
from ctseg.io.dicom.grouping import Broken, add_broken, group_slices
from ctseg.io.dicom.headers import BROKEN_FILE, Header, read_header, reason
from ctseg.io.dicom.pixels import read_voxels
from ctseg.io.dicom.report import GeometryReport, Repairs, make_report, text
from ctseg.io.dicom.resample import fill_between, shear, shear_margins, unshear_labels
from ctseg.io.dicom.rule import choose
from ctseg.io.dicom.series import Series, Slice
from ctseg.io.dicom.silence import pydicom_silent
from ctseg.progress import Progress, Silent, printable
from ctseg.volume import Volume

MAX_LISTED = 30
"""Series that an error lists."""

Gaps = Literal["error", "fill", "ignore"]
Tilt = Literal["error", "shear"]


@dataclass(frozen=True, eq=False)
class OtherObject:
    """A DICOM file that holds no image series: SEG, RTSTRUCT, a report, ...

    Attributes:
        source: Where it is; `headers.read_dataset(source)` reads it whole.
        kind: "SEG", "RTSTRUCT", or the name of its SOP class.
        header: Its data set without pixels.
    """

    source: Source
    kind: str
    header: pydicom.Dataset


@dataclass(frozen=True, eq=False)
class Found:
    """What lies in folders, archives and files.

    Attributes:
        series: Every image series, numbered as in `ctseg dicom ls`.
        others: Every other DICOM object.
        rejected: (name, reason) of each DICOM file that cannot be used and belongs to no series here; a broken file
            of a series is a problem of the series. Names are as `Source.shown` has them, without identifiers.
        not_dicom: How many files are no DICOM at all.
        full_names: The whole name of each rejected file by its name in `rejected`, for those who keep identifiers.
    """

    series: tuple[Series, ...]
    others: tuple[OtherObject, ...]
    rejected: tuple[tuple[str, str], ...]
    not_dicom: int
    full_names: dict[str, str] = field(default_factory=dict)

    def left_out(self, *, keep_identifiers: bool) -> tuple[tuple[str, str], ...]:
        """`rejected`, with the files' whole names for those who keep identifiers."""
        names = self.full_names if keep_identifiers else {}
        return tuple((names.get(name, name), reason) for name, reason in self.rejected)


@dataclass(frozen=True, eq=False, kw_only=True)
class DicomCT:
    """A CT volume and the DICOM images it was made of.

    Attributes:
        volume: Hounsfield units, `[x, y, z]`, z ascending along the slices' normal.
        series: Where it came from.
        slices: The source of each array slice; None where a gap was filled.
        report: What was found and repaired.
        shifts: `(sources, 2)` where pixel (0, 0) of each source image lies in its plane, along x and y; None unsheared.
    """

    volume: Volume
    series: Series
    slices: tuple[Slice | None, ...]
    report: GeometryReport
    shifts: NDArray[np.float64] | None = None

    def on_source_slices(self, labels: NDArray[Any]) -> list[tuple[Slice, NDArray[Any]]]:
        """Labels of the volume's grid on every source image's own pixels: (slice, `[x, y]`), in the volume's order.

        Undoes the shear of a tilted series (nearest voxel); a filled slice has no source and is left out.

        Raises:
            ValueError: if the labels are not of the volume's size.
        """
        if labels.shape != self.volume.geometry.size:
            raise ValueError(f"labels must be of size {self.volume.geometry.size}, got {labels.shape}")
        sourced = [(z, one) for z, one in enumerate(self.slices) if one is not None]
        if self.shifts is None:
            return [(one, labels[:, :, z]) for z, one in sourced]
        return [
            (one, unshear_labels(labels[:, :, z], shift, one.size))
            for (z, one), shift in zip(sourced, self.shifts, strict=True)
        ]


def find_series(paths: Iterable[Path], progress: Progress | None = None) -> Found:
    """Every image series and other DICOM object in files, folders and zip archives, read by their headers only.

    Raises:
        ImageError: if a path cannot be read, an archive is not safe, or there are too many files.
    """
    sources, left_out = list_sources(paths)
    progress = progress or Silent()
    slices: list[Slice] = []
    others: list[OtherObject] = []
    broken = [Broken(source, fault) for source, fault in left_out]
    not_dicom = 0
    progress.start("reading headers", len(sources))
    with pydicom_silent():
        for source in sources:
            header = None
            try:
                header = read_header(source)
                if header is None:
                    not_dicom += 1
                elif header.pixels is None or _is_object(header):
                    others.append(_other(header))
                else:
                    slices += slices_of(header)
            except BROKEN_FILE as error:
                broken.append(Broken(source, reason(error), _uid(header)))
            progress.advance()
        series, alone = add_broken(group_slices(slices), broken)
    progress.finish()
    return Found(
        series=tuple(series),
        others=tuple(others),
        rejected=tuple((one.source.shown, one.reason) for one in alone),
        not_dicom=not_dicom,
        full_names={one.source.shown: one.source.full for one in alone},
    )


def select_series(found: Found, rule: str | None) -> Series:
    """The one CT series that `rule` leaves; without a rule, the only one there is.

    Raises:
        CtsegError: if the rule is wrong, or it leaves none or several; the message lists them.
    """
    with pydicom_silent():
        chosen = choose(found.series, rule)
        if len(chosen) == 1:
            return chosen[0]
        known = [describe(one) for one in (chosen or found.series)[:MAX_LISTED]]
    if not found.series:
        raise CtsegError("no DICOM image series here; name the folder, archive or file that holds one")
    left = f"there are {len(chosen)} CT series" if rule is None else f"'{rule}' leaves {len(chosen) or 'none'}"
    hint = "choose one, e.g. --series '#1'" if chosen else "there are"
    raise CtsegError("\n  ".join([f"one CT series is read, {left}; {hint}:", *known]))


def read_extent(series: Series, *, gaps: Gaps = "error", tilt: Tilt = "error") -> Extent:
    """What `read_series` will take, by the headers.

    Raises:
        ImageError: as `read_series`, as far as headers tell.
    """
    _check_usable(series, gaps, tilt)
    slices = [run[0] for run in at_one_position(series.slices)]
    with np.errstate(all="ignore"):
        geometry = measure(slices)
        if geometry.increment_mm == 0.0:
            raise ImageError(f"cannot read {describe(series)}: its slices do not advance along their normal")
        planes = planes_of(geometry, gaps == "ignore")
        grid = grid_of(slices, geometry, planes, even=gaps != "ignore")
        tilted = any(problem.code == "tilt" for problem in series.problems)
        if tilted:
            grid = grown(grid, drift_pixels(slices, geometry))
    whole = all(value.is_integer() for one in slices for value in one.rescale)
    held = math.prod(grid.size) * (2 if whole else 4)
    return Extent(grid, held, held if tilted else 0, movable=not tilted)


def read_series(series: Series, *, gaps: Gaps = "error", tilt: Tilt = "error", scratch: Path | None = None) -> DicomCT:
    """The volume of a CT series.

    Args:
        series: One of `find_series`.
        gaps: What to do about missing slices: refuse, fill by linear interpolation, or close up as if
            none were missing.
        tilt: What to do about a tilted gantry: refuse, or shift every slice in its plane so that the grid is at right
            angles; the grid grows so that nothing is cut off.
        scratch: Folder on whose disk the voxels are to lie, see `ctseg.scratch`; None: in memory.

    Raises:
        ImageError: if the series cannot become a volume that can be trusted; it names every problem.
    """
    _check_usable(series, gaps, tilt)
    with pydicom_silent(), np.errstate(all="ignore"):
        try:
            return _read(series, gaps == "ignore", scratch)
        except ImageError as error:
            raise ImageError(f"cannot read {describe(series)}: {error}") from error


def _check_usable(series: Series, gaps: Gaps, tilt: Tilt) -> None:
    """Raises ImageError, naming every problem, unless the series is a CT whose slices can be one volume."""
    solved = ({"gaps"} if gaps != "error" else set()) | ({"tilt"} if tilt == "shear" else set())
    with pydicom_silent():
        problems = [problem.text for problem in series.problems if problem.code not in solved]
        if not series.is_ct:
            problems.insert(0, f"it is no CT but {series.kind}; choose a CT series")
        if problems:
            raise ImageError(list_problems(f"cannot read {describe(series)}", problems))


def describe(series: Series) -> str:
    """A series in one line: "series #2 'Abdomen' (CT, 120 slices of 512 x 512, every 2.50 mm)"."""
    name = text(series, "SeriesDescription")
    columns, rows = series.slices[0].size
    step_mm = series.spacing_mm[2]
    slices = "slice" if len(series) == 1 else "slices"
    called = "" if name is None else f" '{name}'"
    every = "" if step_mm is None else f", every {step_mm:.2f} mm"
    return f"series #{series.number}{called} ({series.kind}, {len(series)} {slices} of {columns} x {rows}{every})"


def _read(series: Series, close_up: bool, scratch: Path | None) -> DicomCT:
    slices = without_duplicates(series.slices)
    geometry = measure(slices)
    planes = planes_of(geometry, close_up)
    grid = grid_of(slices, geometry, planes, even=not close_up)
    voxels = read_voxels(slices, planes, grid.size[2], scratch)
    if not voxels.low < voxels.high:
        raise ImageError(f"every voxel is {voxels.low:g}: not a CT; is this the right series?")
    array, shifts = voxels.array, None
    if any(problem.code == "tilt" for problem in series.problems):
        drift = drift_pixels(slices, geometry)
        grown_grid = grown(grid, drift)
        array = shear(array, drift, planes)
        (left, _), (front, _) = shear_margins(drift)
        shifts, grid = drift + np.array([left, front]), grown_grid
    repairs = Repairs(
        sheared=shifts is not None,
        dropped_duplicates=len(series) - len(slices),
        filled_slices=fill_between(array, planes),
        closed_up_mm=float(geometry.along_mm[-1]) - grid.spacing_mm[2] * planes[-1] if close_up else 0.0,
        padding_voxels=voxels.num_padding,
        hu_range=(voxels.low, voxels.high),
    )
    at_plane = dict(zip(planes, slices, strict=True))
    return DicomCT(
        volume=Volume(array, grid),
        series=series,
        slices=tuple(at_plane.get(z) for z in range(grid.size[2])),
        report=make_report(series, grid, geometry, repairs),
        shifts=shifts,
    )


def _uid(header: Header | None) -> str:
    return "" if header is None else str(header.value("SeriesInstanceUID") or "")


def _is_object(header: Header) -> bool:
    """True for what has pixels but is no image series: segmentations, dose, presentation states, waveforms."""
    return str(header.value("Modality")) in ("SEG", "RTDOSE", "PR", "KO") or header.value("Rows") is None


def _other(header: Header) -> OtherObject:
    sop_class = header.value("SOPClassUID")
    is_ct_image = header.value("Modality") == "CT" and (sop_class is None or str(sop_class) in CT_CLASSES)
    if is_ct_image or (header.pixels is None and header.value("Rows") is not None):
        raise ImageError("an image without pixels: cut short, or stripped of them; copy it again from its source")
    kind = header.value("Modality") or (sop_class.name if isinstance(sop_class, UID) else "unknown")
    return OtherObject(header.source, printable(str(kind))[:LONGEST_TEXT], header.dataset)
