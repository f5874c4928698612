"""DICOM SEG, read with pydicom alone: every type and compression, frame by frame, each placed by its own position.

highdicom's reader refuses what other programs write (no Segments Overlap, big endian, RLE of single bits); and as it
writes our files, another reader must judge them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray

from ctseg.errors import ImageError
from ctseg.io import MAX_VOXELS
from ctseg.io.dicom.frames import integer
from ctseg.io.dicom.placing import AXES_TOLERANCE, IN_PLANE_TOLERANCE, Stack
from ctseg.io.dicom.regions import Region, codes_in, shown_name
from ctseg.io.dicom.seg_pixels import decode
from ctseg.io.dicom.tags import tag_value

FRACTION = 0.5
"""A voxel of a FRACTIONAL segment belongs to it from this share of the maximum on."""
_TYPES = ("BINARY", "FRACTIONAL", "LABELMAP")


@dataclass(frozen=True, eq=False, kw_only=True)
class Frame:
    """One frame of a SEG.

    Attributes:
        index: 0-based place in the file.
        segment: Number of its segment, None in a LABELMAP.
        position_mm: `(3,)` LPS, centre of the first pixel.
        axes: `(2, 3)` unit vectors of increasing column and row index.
        spacing_mm: Between columns, between rows.
    """

    index: int
    segment: int | None
    position_mm: NDArray[np.float64]
    axes: NDArray[np.float64]
    spacing_mm: tuple[float, float]


def segments(dataset: pydicom.Dataset) -> tuple[Region, ...]:
    """The segments that a SEG describes; the background of a LABELMAP is none.

    Raises:
        ImageError: if it describes none in a way that can be read.
    """
    try:
        items = list(dataset.SegmentSequence)
        regions = [
            Region(number=int(item.SegmentNumber), name=shown_name(item.get("SegmentLabel")), codes=_codes(item))
            for item in items
        ]
    except Exception as error:  # a stranger's bytes: pydicom raises whatever its parsers meet
        raise ImageError(f"not a readable SEG: {type(error).__name__} in its list of segments") from error
    return tuple(region for region in regions if region.number > 0)


def segment_masks(
    dataset: pydicom.Dataset, numbers: set[int], stack: Stack
) -> Iterator[tuple[int, int, NDArray[np.bool_]]]:
    """The chosen segments on the pixels of the CT's images: (segment number, index of the image, mask `[x, y]`).

    Frames that are empty, or missing because they would be, yield nothing.

    Raises:
        ImageError: if the SEG is broken, or a frame that is not empty lies on no image of the CT.
    """
    kind = str(tag_value(dataset, "SegmentationType"))
    if kind not in _TYPES:
        raise ImageError(f"SegmentationType must be one of {', '.join(_TYPES)}, got '{kind[:40]}'")
    wanted = [frame for frame in frames(dataset) if frame.segment is None or frame.segment in numbers]
    same_size = (dataset.Columns, dataset.Rows) == stack.slices[0].size
    astray = [] if same_size else wanted
    for frame, pixels in zip(wanted, decode(dataset, [f.index for f in wanted]), strict=True) if same_size else ():
        masks = [(number, mask) for number, mask in _masks(dataset, kind, frame, pixels, numbers) if mask.any()]
        index = _find_slice(frame, stack) if masks else None
        if masks and index is None:
            astray.append(frame)
        elif index is not None:
            yield from ((number, index, mask.T) for number, mask in masks)
    if astray:
        raise ImageError(
            f"{len(astray)} of {len(wanted)} frames lie on no image of the CT ({_difference(astray[0], dataset, stack)}"
            f"); the SEG has a grid of its own: resample it, or give the series it was drawn on"
        )


def frames(dataset: pydicom.Dataset) -> list[Frame]:
    """Every frame of a SEG with its place in the patient.

    Raises:
        ImageError: if the frames' places cannot be read, or there are more than the file can be trusted with.
    """
    try:
        count, rows, columns = (int(dataset[key].value) for key in ("NumberOfFrames", "Rows", "Columns"))
        per_frame = list(dataset.PerFrameFunctionalGroupsSequence)
        shared = dataset.SharedFunctionalGroupsSequence[0]
        if len(per_frame) != count:
            raise ImageError(f"{count} frames are promised, {len(per_frame)} are described; copy it again")
        if count * rows * columns > MAX_VOXELS * 8:
            raise ImageError(f"{count} frames of {columns} x {rows} pixels are more than can be trusted")
        with_number = dataset.SegmentationType != "LABELMAP"
        return [_frame(index, item, shared, with_number) for index, item in enumerate(per_frame)]
    except ImageError:
        raise
    except Exception as error:  # a stranger's bytes: pydicom raises whatever its parsers meet
        raise ImageError(f"not a readable SEG: its frames have no place in the patient ({error!s:.80})") from error


def _masks(
    dataset: pydicom.Dataset, kind: str, frame: Frame, pixels: NDArray[Any], numbers: set[int]
) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    if kind == "LABELMAP":
        present = set(np.unique(pixels).tolist()) & numbers
        yield from ((number, pixels == number) for number in sorted(present))
    elif kind == "FRACTIONAL":
        maximum = integer(tag_value(dataset, "MaximumFractionalValue")) or 255
        yield int(frame.segment or 0), pixels >= FRACTION * maximum
    else:
        yield int(frame.segment or 0), pixels != 0


def _find_slice(frame: Frame, stack: Stack) -> int | None:
    """The index of the image whose pixels are the frame's own."""
    image = stack.slices[0]
    same_axes = np.abs(frame.axes - image.axes).max() <= AXES_TOLERANCE
    if not same_axes or not np.allclose(frame.spacing_mm, image.spacing_mm, rtol=1e-3):
        return None
    height = float(frame.position_mm @ image.normal)
    index, apart_mm = stack.find(height)
    in_plane = np.abs(image.axes @ (frame.position_mm - stack.slices[index].position_mm)) / image.spacing_mm
    return index if apart_mm <= stack.tolerance_mm and in_plane.max() <= IN_PLANE_TOLERANCE else None


def _difference(frame: Frame, dataset: pydicom.Dataset, stack: Stack) -> str:
    image = stack.slices[0]
    size = (int(dataset.Columns), int(dataset.Rows))
    if size != image.size:
        return f"{size[0]} x {size[1]} pixels, the CT's have {image.size[0]} x {image.size[1]}"
    if not np.allclose(frame.spacing_mm, image.spacing_mm, rtol=1e-3):
        return f"pixels of {frame.spacing_mm[0]:.4g} mm, the CT's of {image.spacing_mm[0]:.4g} mm"
    if np.abs(frame.axes - image.axes).max() > AXES_TOLERANCE:
        return "another orientation"
    apart_mm = np.linalg.norm([frame.position_mm - other.position_mm for other in stack.slices], axis=1).min()
    return f"the nearest image is {apart_mm:.3g} mm away"


def _frame(index: int, item: pydicom.Dataset, shared: pydicom.Dataset, with_number: bool) -> Frame:
    def group(keyword: str) -> pydicom.Dataset:
        found: pydicom.Dataset = (item if keyword in item else shared)[keyword].value[0]
        return found

    axes = np.array(group("PlaneOrientationSequence").ImageOrientationPatient, dtype=np.float64).reshape(2, 3)
    rows_mm, columns_mm = (float(value) for value in group("PixelMeasuresSequence").PixelSpacing)
    position_mm = np.array(group("PlanePositionSequence").ImagePositionPatient, dtype=np.float64).reshape(3)
    if not (np.isfinite(axes).all() and np.isfinite(position_mm).all()):
        raise ImageError(f"frame {index + 1} has no place: its position is not a number")
    number = int(group("SegmentIdentificationSequence").ReferencedSegmentNumber) if with_number else None
    return Frame(index=index, segment=number, position_mm=position_mm, axes=axes, spacing_mm=(columns_mm, rows_mm))


def _codes(item: pydicom.Dataset) -> tuple[str, ...]:
    return codes_in(item, "SegmentedPropertyTypeCodeSequence") + codes_in(item, "AnatomicRegionSequence")
