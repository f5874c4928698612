"""RTSTRUCT: the ROIs of a structure set as masks on the images of a CT.

Each contour is placed by its own coordinates: references to images, often broken in real files, decide nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np
import pydicom
from numpy.typing import NDArray

from ctseg.errors import ImageError
from ctseg.io.dicom.contours import fill, fill_all
from ctseg.io.dicom.placing import Stack
from ctseg.io.dicom.regions import Region, codes_in, shown_name

MAX_POINTS = 20_000_000
"""In the chosen ROIs of one structure set; a large one has a hundredth of it."""
MAX_CONTOURS = 200_000
"""Likewise."""
_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")


def rois(dataset: pydicom.Dataset) -> tuple[Region, ...]:
    """The ROIs that a structure set names, whether or not they have contours.

    Raises:
        ImageError: if it names none in a way that can be read.
    """
    try:
        observations = dataset.get("RTROIObservationsSequence") or []
        codes = {int(o.ReferencedROINumber): codes_in(o, "RTROIIdentificationCodeSequence") for o in observations}
        numbered = [(int(item.ROINumber), shown_name(item.get("ROIName"))) for item in dataset.StructureSetROISequence]
        return tuple(Region(number=n, name=name, codes=codes.get(n, ()), kind="ROI") for n, name in numbered)
    except Exception as error:  # a stranger's bytes: pydicom raises whatever its parsers meet
        raise ImageError(f"not a readable RTSTRUCT: {type(error).__name__} in its list of ROIs") from error


def roi_masks(
    dataset: pydicom.Dataset, numbers: set[int], stack: Stack, notes: list[str]
) -> Iterator[tuple[int, int, NDArray[np.bool_]]]:
    """The chosen ROIs on the pixels of the CT's images: (ROI number, index of the image, mask `[x, y]`).

    A pixel belongs to a ROI when its centre lies within. Points and open lines enclose nothing: they are left out,
    and a line in `notes` says so.

    Raises:
        ImageError: if a contour is broken, does not lie in an image's plane, or lies between images.
    """
    for number, contours in _contours(dataset, numbers, notes).items():
        exclusive = bool(contours[_CLOSED[1]])
        planes = _by_plane(contours[_CLOSED[0]] + contours[_CLOSED[1]], stack, f"ROI #{number}", notes)
        for index, polygons in sorted(planes.items()):
            size = stack.slices[index].size
            if exclusive:
                yield number, index, np.logical_xor.reduce([fill(polygon, size) for polygon in polygons])
            else:
                yield number, index, fill_all(polygons, size)


def _contours(
    dataset: pydicom.Dataset, numbers: set[int], notes: list[str]
) -> dict[int, dict[str, list[NDArray[np.float64]]]]:
    """For each chosen ROI, its closed contours by type, each `(points, 3)` LPS mm."""
    found: dict[int, dict[str, list[NDArray[np.float64]]]] = {
        number: {kind: [] for kind in _CLOSED} for number in sorted(numbers)
    }
    skipped: Counter[tuple[int, str]] = Counter()
    points_left, contours_left = MAX_POINTS, MAX_CONTOURS
    try:
        for item in dataset.get("ROIContourSequence") or []:
            number = int(item.ReferencedROINumber)
            for contour in (item.get("ContourSequence") or []) if number in numbers else []:
                kind = str(contour.get("ContourGeometricType"))
                points = _points(contour)
                points_left -= len(points)
                contours_left -= 1
                if kind not in _CLOSED or len(points) < 3:
                    skipped[number, kind if kind not in _CLOSED else "contour of fewer than 3 points"] += 1
                elif not np.isfinite(points).all():
                    raise ImageError(f"ROI #{number}: a contour's numbers must be finite")
                elif min(points_left, contours_left) < 0:
                    raise ImageError(f"more than {MAX_CONTOURS} contours or {MAX_POINTS} points; choose fewer ROIs")
                else:
                    found[number][kind].append(points)
    except ImageError:
        raise
    except Exception as error:  # a stranger's bytes: pydicom raises whatever its parsers meet
        raise ImageError(f"not a readable RTSTRUCT: {type(error).__name__} in its contours ({error!s:.80})") from error
    notes.extend(f"ROI #{number}: {count} x {kind[:40]} left out" for (number, kind), count in skipped.items())
    empty = [number for number, contours in found.items() if not any(contours.values())]
    notes.extend(f"ROI #{number}: no closed contour, so it is empty" for number in empty)
    return found


def _points(contour: pydicom.Dataset) -> NDArray[np.float64]:
    """`(points, 3)` of a contour; pydicom's own conversion, number by number, takes ten times as long."""
    element = contour.get_item("ContourData") if "ContourData" in contour else None
    values = [] if element is None else element.value
    if isinstance(values, bytes):
        values = values.rstrip(b" \0").split(b"\\") if values.strip(b" \0") else []
    return np.array(values, dtype=np.float64).reshape(-1, 3)


def _by_plane(
    contours: list[NDArray[np.float64]], stack: Stack, roi: str, notes: list[str]
) -> dict[int, list[NDArray[np.float64]]]:
    """The contours on each image, in its pixels; those above, below or beside all images are left out with a note.

    Raises:
        ImageError: if any lies between images, or across them.
    """
    planes: dict[int, list[NDArray[np.float64]]] = defaultdict(list)
    between: list[float] = []
    outside = beside = 0
    low, high = stack.heights_mm.min() - stack.tolerance_mm, stack.heights_mm.max() + stack.tolerance_mm
    for points in contours:
        heights = points @ stack.slices[0].normal
        index, _ = stack.find(float(np.median(heights)))
        apart_mm = float(np.abs(heights - stack.heights_mm[index]).max())
        if apart_mm <= stack.tolerance_mm:
            image = stack.slices[index]
            pixels = (points - image.position_mm) @ image.axes.T / image.spacing_mm
            if (pixels.max(axis=0) < 0).any() or (pixels.min(axis=0) > np.array(image.size) - 1).any():
                beside += 1
            else:
                planes[index].append(pixels)
        elif heights.max() < low or heights.min() > high:
            outside += 1
        else:
            between.append(apart_mm)
    if between:
        raise ImageError(
            f"{roi}: {len(between)} contours lie between images of the CT or across them, up to {max(between):.3g} mm "
            f"off; give the series they were drawn on"
        )
    if outside:
        notes.append(f"{roi}: {outside} contours above or below all images of the CT left out")
    if beside:
        notes.append(f"{roi}: {beside} contours beside the images of the CT left out, as they cover no pixel")
    if planes and len(planes) <= max(planes) - min(planes):
        notes.append(f"{roi}: contours on {len(planes)} of the {max(planes) - min(planes) + 1} images that it spans")
    return planes
