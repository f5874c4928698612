"""What files made from a DICOM series are called: pseudonyms, unless identifiers are to be kept."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from pydicom.uid import UID

from ctseg.io.dicom.series import Series
from ctseg.privacy import pseudonym, pseudonym_key


def series_name(series: Series, known: Sequence[Series], *, keep_identifiers: bool) -> str:
    """One name for one series, of letters, digits, dots and dashes only, whatever its header says.

    It comes from the UID alone. Where several of `known` share the UID, or it is empty, it comes from the content too:
    a part keeps its name when further parts are added.
    """
    kept = keep_identifiers and _is_valid(series.uid)
    if series.uid and sum(other.uid == series.uid for other in known) <= 1:
        return series.uid if kept else pseudonym(series.uid, pseudonym_key(), "ct-")
    content = f"{series.uid} {_first_image(series)}"
    if kept:
        return f"{series.uid}-{int(hashlib.sha256(content.encode()).hexdigest(), 16) % 10**10:010d}"
    return pseudonym(content, pseudonym_key(), "ct-")


def patient_name(series: Series, *, keep_identifiers: bool) -> str | None:
    """Whose series it is; None where its header does not tell."""
    patient = str(series.value("PatientID") or series.value("PatientName") or "").strip()
    if not patient:
        return None
    return patient if keep_identifiers else pseudonym(patient, pseudonym_key(), "patient-")


def _is_valid(uid: str) -> bool:
    """True for digits and dots as the standard has them: no separators, no leading dot, no blanks."""
    return bool(UID(uid).is_valid) and str(UID(uid)) == uid  # pydicom's are stripped of blanks


def _first_image(series: Series) -> str:
    """The same text however the images are ordered: the smallest SOPInstanceUID, its frame and place."""
    return min(
        f"{one.value('SOPInstanceUID')} {one.frame or 0:06d} {one.position_mm.tolist()} {one.axes.tolist()} {one.size}"
        for one in series
    )
