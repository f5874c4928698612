"""From slices to series: what was acquired together and lies in one stack."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ctseg.io.dicom.checks import judge
from ctseg.io.dicom.frames import LARGEST, integer, kind_of
from ctseg.io.dicom.geometry import POSITION_TOLERANCE_MM, sort_slices
from ctseg.io.dicom.series import Series, Slice

ORIENTATION_TOLERANCE = 1e-3
"""Slices whose direction cosines differ by more (0.06 degrees) from the first one's are not of its stack."""

_SPLITTERS = (
    "FrameOfReferenceUID",
    "AcquisitionNumber",
    "FrameAcquisitionNumber",
    "TemporalPositionIdentifier",
    "TemporalPositionIndex",
    "StackID",
    "ConvolutionKernel",
    "ImageType",
    "AcquisitionTime",
    "ContentTime",
)
"""Tags that tell several stacks of one series apart, tried in this order where slices share positions."""


def group_slices(slices: Iterable[Slice]) -> list[Series]:
    """Series of slices that share SeriesInstanceUID, kind, size, spacing and orientation, numbered from 1.

    Where several slices lie at one position, an acquisition number or time that tells whole stacks apart splits them.
    """
    stacks: dict[tuple[object, ...], list[Slice]] = defaultdict(list)
    first_axes: dict[tuple[object, ...], NDArray[np.float64]] = {}
    for one in slices:
        uid = str(one.value("SeriesInstanceUID") or "")
        key = (uid, kind_of(one.file), one.size, *(str(round(s, 4)) for s in one.spacing_mm))
        turned = np.nan_to_num(one.axes - first_axes.setdefault(key, one.axes), nan=LARGEST)
        stack = (*key, (np.round(turned / (2 * ORIENTATION_TOLERANCE)) + 0.0).tobytes())
        stacks[stack].append(one)
    series = [
        (str(key[0]), str(key[1]), part)
        for key, members in stacks.items()
        for part in split_positions(sort_slices(members))
    ]
    series.sort(key=lambda entry: (entry[1] != "CT", _series_number(entry[2][0])))
    of_uid = Counter((uid, kind) for uid, kind, _ in series if uid)
    return [
        judge(Series(number=number, uid=uid, kind=kind, slices=tuple(part), geometry=None), of_uid[uid, kind])
        for number, (uid, kind, part) in enumerate(series, start=1)
    ]


def split_positions(slices: list[Slice]) -> list[list[Slice]]:
    """Sorted slices in one part or, if a tag tells apart stacks that share positions, in one part per stack."""
    if not _shares_positions(slices):
        return [slices]
    for keyword in _SPLITTERS:
        parts: dict[str, list[Slice]] = defaultdict(list)
        for one in slices:
            parts[str(one.value(keyword))].append(one)
        whole = all(len(part) > 1 and not _shares_positions(part) for part in parts.values())
        if len(parts) > 1 and whole:
            return list(parts.values())
    return [slices]


def _shares_positions(slices: list[Slice]) -> bool:
    if np.isnan(slices[0].position_mm).any():
        return False
    steps = np.diff([one.position_mm for one in slices], axis=0)
    return bool((np.abs(steps).max(axis=1, initial=0.0) <= POSITION_TOLERANCE_MM).any()) if len(steps) else False


def _series_number(one: Slice) -> tuple[int, str]:
    number = integer(one.value("SeriesNumber"))
    return (10**9 if number is None else number, one.source.shown)
