"""From slices to series: what was acquired together and lies in one stack."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from ctseg.io.dicom.checks import judge
from ctseg.io.dicom.files import Source
from ctseg.io.dicom.frames import LARGEST, integer, kind_of
from ctseg.io.dicom.geometry import POSITION_TOLERANCE_MM, sort_slices
from ctseg.io.dicom.series import Finding, Series, Slice

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
_ACQUISITIONS = (
    "AcquisitionNumber",
    "FrameAcquisitionNumber",
    "TemporalPositionIdentifier",
    "TemporalPositionIndex",
)
"""Tags that tell stacks apart where the slices of one lie between those of another."""


@dataclass(frozen=True)
class Broken:
    """A file that cannot be used.

    Attributes:
        source: Where it is.
        reason: Why, and what to do.
        uid: The SeriesInstanceUID that it names, empty if it does not get that far.
    """

    source: Source
    reason: str
    uid: str = ""


def add_broken(series: Sequence[Series], broken: Sequence[Broken]) -> tuple[list[Series], list[Broken]]:
    """The series, those with broken files with the problem "broken-files"; and the files that belong to none."""
    of_uid: dict[str, list[Broken]] = defaultdict(list)
    for one in broken:
        of_uid[one.uid].append(one)
    known = {one.uid for one in series if one.uid}
    told = [
        dataclasses.replace(one, problems=(*one.problems, _broken_files(of_uid[one.uid])))
        if one.uid and one.uid in of_uid
        else one
        for one in series
    ]
    return told, [one for one in broken if one.uid not in known]


def _broken_files(files: Sequence[Broken]) -> Finding:
    first = files[0]
    return Finding(
        "broken-files",
        f"{len(files)} file(s) of this series cannot be read (the first, '{first.source.shown}': {first.reason}); "
        f"copy them again",
    )


def group_slices(slices: Iterable[Slice]) -> list[Series]:
    """Series of slices that share SeriesInstanceUID, kind, size, spacing and orientation, numbered from 1.

    Where several slices lie at one position, an acquisition number or time that tells whole stacks apart splits them;
    so does an acquisition number whose stacks lie between each other.
    """
    stacks: dict[tuple[object, ...], list[Slice]] = defaultdict(list)
    first_axes: dict[tuple[object, ...], bytes] = {}
    for one in slices:
        uid = str(one.value("SeriesInstanceUID") or "")
        key = (uid, kind_of(one.file), one.size, *(str(round(s, 4)) for s in one.spacing_mm))
        axes = one.axes.tobytes()
        stack = (*key, _turn(axes, first_axes.setdefault(key, axes)))
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
    """Sorted slices in one part or, if a tag tells apart stacks that overlap, in one part per stack."""
    shared = _shares_positions(slices)
    for keyword in _SPLITTERS if shared else _ACQUISITIONS:
        by_value: dict[str, list[Slice]] = defaultdict(list)
        for one in slices:
            by_value[str(one.value(keyword))].append(one)
        parts = list(by_value.values())
        whole = all(len(part) > 1 and not _shares_positions(part) for part in parts)
        if len(parts) > 1 and whole and (shared or _interleaved(parts)):
            return parts
    return [slices]


@lru_cache
def _turn(axes: bytes, first: bytes) -> bytes:
    """How far axes are from others, in steps of the tolerance."""
    turned = np.nan_to_num(np.frombuffer(axes) - np.frombuffer(first), nan=LARGEST)
    return bytes((np.round(turned / (2 * ORIENTATION_TOLERANCE)) + 0.0).tobytes())


def _interleaved(parts: list[list[Slice]]) -> bool:
    """True if sorted stacks overlap along their normal."""
    normal = parts[0][0].normal
    ends = sorted((float(part[0].position_mm @ normal), float(part[-1].position_mm @ normal)) for part in parts)
    return any(start < end for (_, end), (start, _) in pairwise(ends))


def _shares_positions(slices: list[Slice]) -> bool:
    if np.isnan(slices[0].position_mm).any():
        return False
    steps = np.diff([one.position_mm for one in slices], axis=0)
    return bool((np.abs(steps).max(axis=1, initial=0.0) <= POSITION_TOLERANCE_MM).any()) if len(steps) else False


def _series_number(one: Slice) -> tuple[int, int]:
    number = integer(one.value("SeriesNumber"))
    return (10**9 if number is None else number, one.source.number)
