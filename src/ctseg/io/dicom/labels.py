"""Label maps from SEG and RTSTRUCT objects, on the grid of the CT they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pydicom
from numpy.typing import NDArray

from ctseg.errors import ImageError
from ctseg.io.dicom.placing import Stack, on_grid, planes
from ctseg.io.dicom.read import DicomCT
from ctseg.io.dicom.regions import Choice, Region, check_found, choose_regions
from ctseg.io.dicom.rtstruct_read import roi_masks, rois
from ctseg.io.dicom.seg_read import segment_masks, segments
from ctseg.io.dicom.tags import tag_value
from ctseg.volume import Volume

Overlap = Literal["error", "first", "last"]


@dataclass(frozen=True, eq=False, kw_only=True)
class DicomLabels:
    """A label map read from DICOM.

    Attributes:
        labels: uint8 on the CT's grid.
        regions: Label value -> the regions it was made of.
        notes: What was left out, and why.
    """

    labels: Volume
    regions: dict[int, tuple[Region, ...]]
    notes: tuple[str, ...]


def regions_of(dataset: pydicom.Dataset) -> tuple[Region, ...]:
    """The segments of a SEG or the ROIs of an RTSTRUCT.

    Raises:
        ImageError: if the object is neither, or broken.
    """
    return segments(dataset) if _kind(dataset) == "SEG" else rois(dataset)


def read_labels(
    objects: Sequence[pydicom.Dataset],
    ct: DicomCT,
    choices: Sequence[Choice],
    *,
    overlap: Overlap = "error",
    allow_missing: bool = False,
) -> DicomLabels:
    """The chosen regions of SEG and RTSTRUCT objects as one label map on the CT's grid.

    Args:
        objects: Whole data sets, pixels included.
        ct: The CT that they were drawn on.
        choices: Which regions become which value.
        overlap: Where regions of two values overlap: refuse, or keep the value that `choices` name first or last.
        allow_missing: A value for which there is no region is fine, as long as there is one for any; one whose
            regions have no voxel gets a note.

    Raises:
        ImageError: if an object is broken, lies on another grid, or a region that was asked for is lacking or empty.
    """
    known = [regions_of(dataset) for dataset in objects]
    values = [choose_regions(regions, choices) for regions in known]
    chosen = [(of[r.number], r) for regions, of in zip(known, values, strict=True) for r in regions if r.number in of]
    check_found({value for value, _ in chosen}, [r for of in known for r in of], choices, allow_missing=allow_missing)
    notes: list[str] = []
    stack = Stack.of(planes(ct))
    order = list(dict.fromkeys(choice.value for choice in choices))
    labels = np.zeros((len(stack.slices), *stack.slices[0].size), np.uint8)
    drawn: set[int] = set()
    clashes = 0
    for dataset, value_of in zip(objects, values, strict=True):
        for number, index, mask in _masks(dataset, set(value_of), stack, notes):
            drawn.add(index)
            clashes += _lay(labels[index], mask, value_of[number], order if overlap != "last" else order[::-1])
    if clashes and overlap == "error":
        raise ImageError(f"labels overlap in {clashes} voxels; choose --overlap first or last, or other regions")
    if clashes:
        notes.append(f"labels overlapped in {clashes} voxels; the one named {overlap} was kept")
    regions = {value: tuple(r for v, r in chosen if v == value) for value in sorted({value for value, _ in chosen})}
    array = on_grid(ct, labels, drawn)
    _check_voxels(array, regions, notes, allow_missing)
    return DicomLabels(labels=Volume(array, ct.volume.geometry), regions=regions, notes=tuple(notes))


def _check_voxels(
    array: NDArray[np.uint8], regions: dict[int, tuple[Region, ...]], notes: list[str], allow_missing: bool
) -> None:
    """Passes if every value has a voxel; if some may be missing, adds a note on those without.

    Raises:
        ImageError: naming the regions, and what was left out of them.
    """
    counts = np.bincount(array.ravel(order="K"), minlength=256)
    empty = [value for value in regions if counts[value] == 0]
    lines = [f"label {value} ({', '.join(map(str, regions[value]))}) has no voxel on the CT" for value in empty]
    if empty and not allow_missing:
        raise ImageError("; ".join([*lines, *notes]))
    notes.extend(lines)


def _masks(
    dataset: pydicom.Dataset, numbers: set[int], stack: Stack, notes: list[str]
) -> Iterator[tuple[int, int, NDArray[np.bool_]]]:
    if _kind(dataset) == "SEG":
        return segment_masks(dataset, numbers, stack)
    return roi_masks(dataset, numbers, stack, notes)


def _lay(labels: NDArray[np.uint8], mask: NDArray[np.bool_], value: int, order: list[int]) -> int:
    """Sets `value` under `mask`, except over values that come earlier in `order`; the number of voxels in dispute."""
    clash = mask & (labels != 0) & (labels != value)
    earlier = order[: order.index(value)]
    labels[mask & ~np.isin(labels, earlier)] = value
    return int(np.count_nonzero(clash))


def _kind(dataset: pydicom.Dataset) -> str:
    kind = str(tag_value(dataset, "Modality"))
    if kind not in ("SEG", "RTSTRUCT"):
        raise ImageError(f"labels come from SEG or RTSTRUCT objects, got '{kind[:40]}'")
    return kind
