"""What every DICOM object that is made from a CT says about the patient, the study and the images behind it.

Real headers lack tags or hold values that break their own rules. What the standard wants filled is made up, what may
be empty is left empty, and a note says so: no missing tag keeps a result from being written.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pydicom
from pydicom import config
from pydicom.datadict import dictionary_VR
from pydicom.uid import UID, CTImageStorage, generate_uid
from pydicom.valuerep import DA, TM, format_number_as_ds, validate_value

from ctseg.io.dicom.series import Slice

MAKER = "ctseg"
COLOURS = (
    (220, 60, 50),
    (60, 130, 220),
    (70, 170, 80),
    (240, 180, 40),
    (150, 90, 190),
    (60, 190, 190),
    (230, 120, 180),
)
"""RGB that viewers are asked to show the structures in, over again where there are more."""
UTF8 = "ISO_IR 192"
SERIES_NUMBER_OFFSET = 1000
"""Added to the CT's SeriesNumber, so that a viewer lists results after the scan they belong to."""
_MAX_SERIES_NUMBER = 2**31 - 1 - SERIES_NUMBER_OFFSET
_EMPTY_IF_MISSING = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "ReferringPhysicianName",
    "StudyID",
    "PositionReferenceIndicator",
)
_ABSENT_IF_MISSING = ("StudyDescription", "PatientAge", "PatientSize", "PatientWeight")
_SALT = uuid.uuid4()
_PARSERS: dict[str, Callable[[str], object]] = {"DA": DA, "TM": TM, "DS": lambda text: float(text or 0)}
_SEXES = ("M", "F", "O", "")


@dataclass(frozen=True, eq=False)
class References:
    """What a derived object says about its source.

    Attributes:
        study: Tags of patient, study and frame of reference, all valid, texts in UTF-8.
        series_uid: SeriesInstanceUID of the CT.
        series_number: For the derived object.
        notes: What was missing or wrong in the CT's header.
    """

    study: pydicom.Dataset
    series_uid: str
    series_number: int
    notes: tuple[str, ...]


def references(image: Slice) -> References:
    """What objects derived from the series of `image` take over from its header."""
    study, notes = pydicom.Dataset(), []
    study.SpecificCharacterSet = UTF8
    for keyword in (*_EMPTY_IF_MISSING, *_ABSENT_IF_MISSING):
        text = _text(image, keyword)
        if text is None or (keyword == "PatientSex" and text not in _SEXES):
            notes.append(f"{keyword} of the CT breaks DICOM's rules: left empty")
            text = ""
        if text or keyword in _EMPTY_IF_MISSING:
            setattr(study, keyword, text)
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID"):
        setattr(study, keyword, _uid(image, keyword, notes))
    if _stored_uid(image) is None:
        notes.append("SOPInstanceUID of the CT is missing or breaks DICOM's rules: a viewer will not find its images")
    number = _text(image, "SeriesNumber") or ""
    valid = number.isdecimal() and 0 < int(number) <= _MAX_SERIES_NUMBER
    series_uid = _uid(image, "SeriesInstanceUID", notes)
    return References(study, series_uid, SERIES_NUMBER_OFFSET + (int(number) if valid else 0), tuple(notes))


def instance(image: Slice) -> tuple[str, str]:
    """SOPClassUID and SOPInstanceUID of an image's file; made up if it has none, and then the same at every call."""
    uid = _stored_uid(image) or f"2.25.{uuid.uuid5(_SALT, _place(image)).int}"
    return str(image.value("SOPClassUID") or CTImageStorage), uid


def _place(image: Slice) -> str:
    return f"{image.source.path}\0{image.source.member}"


def _stored_uid(image: Slice) -> str | None:
    """The SOPInstanceUID in a file, or in its first lines, where anonymisers forget it."""
    meta = getattr(image.header, "file_meta", None) or pydicom.Dataset()
    uids = (str(image.value("SOPInstanceUID") or ""), str(meta.get("MediaStorageSOPInstanceUID") or ""))
    return next((uid for uid in uids if UID(uid).is_valid), None)


def decimal(value: float) -> str:
    """A number as DICOM's decimal string: at most 16 characters, as many digits as they hold."""
    return str(format_number_as_ds(float(value) + 0.0))


def decimals(values: Iterable[float]) -> list[str]:
    """Numbers as decimal strings."""
    return [decimal(value) for value in values]


def _text(image: Slice, keyword: str) -> str | None:
    """The value of a tag as text, empty if absent; None if it breaks the rules of its type."""
    value = image.value(keyword)
    text = "" if value is None else str(value).strip()
    try:
        validate_value(dictionary_VR(keyword), text, config.RAISE)
        _ = _PARSERS.get(dictionary_VR(keyword), str)(text)  # a date of eight digits need not be one
    except ValueError:
        return None
    return text if "\\" not in text else None


def _uid(image: Slice, keyword: str, notes: list[str]) -> str:
    uid = str(image.value(keyword) or "")
    if uid and UID(uid).is_valid:
        return uid
    notes.append(f"{keyword} of the CT is missing or breaks DICOM's rules: a new one was made")
    return str(generate_uid(prefix=None))
