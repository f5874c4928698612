"""What files made from a DICOM series are called: pseudonyms, unless identifiers are to be kept."""

from __future__ import annotations

from collections.abc import Sequence

from ctseg.io.dicom.series import Series
from ctseg.privacy import pseudonym, pseudonym_key


def series_name(series: Series, known: Sequence[Series], *, keep_identifiers: bool) -> str:
    """One name for one series, also when the archive grows; parts of one UID among `known` are numbered."""
    uid = series.uid if keep_identifiers else pseudonym(series.uid, pseudonym_key(), "ct-")
    parts = [other.number for other in known if other.uid == series.uid]
    return f"{uid}-{parts.index(series.number) + 1}" if len(parts) > 1 else uid


def patient_name(series: Series, *, keep_identifiers: bool) -> str | None:
    """Whose series it is; None where its header does not tell."""
    patient = str(series.value("PatientID") or series.value("PatientName") or "").strip()
    if not patient:
        return None
    return patient if keep_identifiers else pseudonym(patient, pseudonym_key(), "patient-")
