"""Tags of DICOM headers: where those that ctseg reads stand, and their values, whatever the bytes are."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pydicom
from pydicom.datadict import dictionary_has_tag, dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement, convert_raw_data_element
from pydicom.tag import BaseTag

LONGEST_SHARED = 256
"""Bytes of a value that is converted once for all files; a longer one is seldom the same in two."""
_PLAIN_VRS = frozenset(("CS", "DS", "IS", "TM", "UI", "US"))  # no value of theirs depends on the character set

FUNCTIONAL_GROUPS = {
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "SliceThickness": "PixelMeasuresSequence",
    "SpacingBetweenSlices": "PixelMeasuresSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
    "RescaleType": "PixelValueTransformationSequence",
    "FrameType": "CTImageFrameTypeSequence",
    "FrameAcquisitionNumber": "FrameContentSequence",
    "TemporalPositionIndex": "FrameContentSequence",
    "StackID": "FrameContentSequence",
    "KVP": "CTXRayDetailsSequence",
    "ConvolutionKernel": "CTReconstructionSequence",
    "GantryDetectorTilt": "CTAcquisitionDetailsSequence",
}
"""Where multi-frame files keep, per frame or for all frames, what other files have at the top."""

SCANNED = frozenset(
    (
        *FUNCTIONAL_GROUPS,
        "SOPClassUID",
        "SOPInstanceUID",
        "StudyInstanceUID",
        "SeriesInstanceUID",
        "SeriesNumber",
        "FrameOfReferenceUID",
        "Modality",
        "ImageType",
        "AcquisitionNumber",
        "AcquisitionTime",
        "ContentTime",
        "TemporalPositionIdentifier",
        "LossyImageCompression",
        "NumberOfFrames",
        "Rows",
        "Columns",
        "SamplesPerPixel",
        "PhotometricInterpretation",
        "BitsAllocated",
        "BitsStored",
        "HighBit",
        "PixelRepresentation",
        "PixelPaddingValue",
        "PixelPaddingRangeLimit",
        "SharedFunctionalGroupsSequence",
        "PerFrameFunctionalGroupsSequence",
    )
)
"""The tags that say what an image is and where it lies."""


def tag_value(header: pydicom.Dataset, keyword: str, frame: int | None = None) -> Any:
    """The value of a tag: of `frame`, else shared by all frames, else of the file; None if it is not readable."""
    group = FUNCTIONAL_GROUPS.get(keyword)
    if frame is not None and group is not None:
        for groups, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
            item = _item(_item(header, groups, index), group, 0)
            if item is not None and keyword in item:
                return value_of(item, keyword)
    return value_of(header, keyword)


def value_of(dataset: pydicom.Dataset, keyword: str) -> Any:
    """The value of a tag at the top of a data set; None if it is not there, empty or not readable."""
    tag = _tag(keyword)
    if tag is None or tag not in dataset:
        return None
    try:
        element = dataset.get_item(tag)
        if isinstance(element, RawDataElement) and element.length <= LONGEST_SHARED and _is_plain(tag, element.VR):
            value = _converted(tag, element.VR, element.value, element.is_little_endian)
        else:
            value = dataset[tag].value
    except Exception:  # the conversion of a hostile value raises anything
        return None
    return None if value is None or value == "" else value


def _item(dataset: pydicom.Dataset | None, keyword: str, index: int) -> pydicom.Dataset | None:
    items = None if dataset is None else value_of(dataset, keyword)
    try:
        return None if items is None else items[index]
    except (IndexError, TypeError):
        return None


@lru_cache
def _tag(keyword: str) -> BaseTag | None:
    """A tag as pydicom's data sets have them; they are slow to look up any other."""
    number = tag_for_keyword(keyword)
    return None if number is None else BaseTag(number)


@lru_cache
def _is_plain(tag: int, vr: str | None) -> bool:
    """Whether a value is what its bytes say alone; without a VR in the file the dictionary's holds."""
    if vr is None:
        vr = dictionary_VR(tag) if dictionary_has_tag(tag) else None
    return vr in _PLAIN_VRS


@lru_cache(maxsize=2**14)
def _converted(tag: int, vr: str | None, content: bytes, is_little_endian: bool) -> Any:
    """The value of an element: converted once for all files of a series that say the same. Not to be changed."""
    raw = RawDataElement(BaseTag(tag), vr, len(content), content, 0, vr is None, is_little_endian)
    return convert_raw_data_element(raw).value
