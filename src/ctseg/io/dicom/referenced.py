"""Which CT series a SEG or RTSTRUCT was drawn on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property

import pydicom

from ctseg.errors import ImageError
from ctseg.io.dicom.series import Series
from ctseg.io.dicom.tags import tag_value

_NOT_SEARCHED = ("ROIContourSequence", "PerFrameFunctionalGroupsSequence")
"""Sequences of thousands of items that repeat what the others say."""


class CTFinder:
    """Finds CT series by what other objects say about them.

    Args:
        known: Every series that there is.
    """

    def __init__(self, known: Sequence[Series]) -> None:
        self._cts = [series for series in known if series.is_ct]

    def find(self, header: pydicom.Dataset) -> Series:
        """The series that an object names; else the one of the images it names; else the only one of its frame.

        Raises:
            ImageError: if it is not here, or could be several.
        """
        named = set(_uids(header, "SeriesInstanceUID")) - {str(tag_value(header, "SeriesInstanceUID"))}
        candidates = [series for series in self._cts if series.uid in named] or self._cts
        if len(candidates) == 1 and candidates[0].uid in named:
            return candidates[0]
        hits = Counter(self._of_image.get(uid) for uid in set(_uids(header, "ReferencedSOPInstanceUID")))
        counts = sorted(((hits[series.number], series.number, series) for series in candidates), reverse=True)
        if counts and counts[0][0] > (counts[1][0] if len(counts) > 1 else 0):
            return counts[0][2]
        frames = set(_uids(header, "FrameOfReferenceUID"))
        in_frame = [series for series in candidates if str(series.value("FrameOfReferenceUID")) in frames]
        if len(in_frame) > 1:
            raise ImageError(f"{len(in_frame)} CT series fit what it refers to; give it with one of them only")
        if not in_frame:
            raise ImageError("the CT that it refers to is not here; add its folder")
        return in_frame[0]

    @cached_property
    def _of_image(self) -> dict[str, int]:
        """SOPInstanceUID -> number of its series."""
        return {str(image.value("SOPInstanceUID")): series.number for series in self._cts for image in series}


def _uids(dataset: pydicom.Dataset, keyword: str) -> Iterator[str]:
    """Every value of a UID in a data set and its sequences.

    Raises:
        ImageError: if the data set is broken.
    """
    try:
        for element in dataset:
            if element.keyword == keyword and element.value:
                yield str(element.value)
            elif element.VR == "SQ" and element.keyword not in _NOT_SEARCHED:
                for item in element.value:
                    yield from _uids(item, keyword)
    except ImageError:
        raise
    except Exception as error:  # a stranger's bytes: pydicom raises whatever its parsers meet
        raise ImageError(f"broken: {type(error).__name__} in its references") from error
