"""What is odd or wrong about a series, judged by its headers: every finding with what to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pydicom

from ctseg.io import MAX_VOXELS
from ctseg.io.dicom import jpeg12
from ctseg.io.dicom.frames import LONGEST_TEXT, integer
from ctseg.io.dicom.geometry import geometry_notes, geometry_problems, measure, shown
from ctseg.io.dicom.series import Finding, Series, Slice
from ctseg.progress import printable


def judge(series: Series, series_of_its_uid: int = 1) -> Series:
    """The series with its geometry, problems and notes; anything but a CT as it is."""
    if not series.is_ct:
        return series
    problems = [Finding(code, text) for code, check in _HEADER_CHECKS.items() for text in check(series.slices)]
    notes = [Finding(code, text) for code, check in _HEADER_NOTES.items() for text in check(series.slices)]
    geometry = None
    places = [(*one.position_mm, *one.axes.flat, *one.spacing_mm) for one in series.slices]
    if not np.isnan(places).any():
        geometry = measure(series.slices)
        problems += geometry_problems(series.slices, geometry)
        notes += geometry_notes(series.slices, geometry)
    if series_of_its_uid > 1:
        notes.append(
            Finding("shared-uid", f"{series_of_its_uid} stacks have its SeriesInstanceUID; they are separated")
        )
    return dataclasses.replace(series, geometry=geometry, problems=tuple(problems), notes=tuple(notes))


def _positions(slices: Sequence[Slice]) -> Iterator[str]:
    lacking = sum(bool(np.isnan(one.position_mm).any()) for one in slices)
    if lacking:
        yield f"ImagePositionPatient is missing in {lacking} of {len(slices)} slices; nothing else says where they lie"


def _axes(slices: Sequence[Slice]) -> Iterator[str]:
    lacking = sum(bool(np.isnan(one.axes).any()) for one in slices)
    if lacking:
        yield (
            f"ImageOrientationPatient is missing or not at right angles in {lacking} of {len(slices)} slices; export "
            f"it again with its geometry"
        )


def _pixel_spacing(slices: Sequence[Slice]) -> Iterator[str]:
    if np.isnan(slices[0].spacing_mm).any():
        hint = " (ImagerPixelSpacing is that of the detector)" if slices[0].value("ImagerPixelSpacing") else ""
        yield f"PixelSpacing is missing or not positive{hint}; export it again with its geometry"


def _single(slices: Sequence[Slice]) -> Iterator[str]:
    if len(slices) == 1:
        yield "a single slice is no volume; name the folder of its series"


def _placeless_frames(slices: Sequence[Slice]) -> Iterator[str]:
    frames = max((integer(one.value("NumberOfFrames")) or 1 for one in slices if one.frame is None), default=1)
    if frames > 1:
        yield f"a file holds {frames} frames without a place of their own; export it as Enhanced CT or single images"


def _studies(slices: Sequence[Slice]) -> Iterator[str]:
    studies = {str(one.value("StudyInstanceUID") or "") for one in slices}
    if len(studies) > 1:
        yield f"its slices belong to {len(studies)} studies; look whether they are one CT of one patient"


def _frames_of_reference(slices: Sequence[Slice]) -> Iterator[str]:
    uids = {str(one.value("FrameOfReferenceUID")) for one in slices}
    if len(uids) > 1:
        yield f"{len(uids)} frames of reference in one stack: the patient was moved between them; read them apart"


def _rescale(slices: Sequence[Slice]) -> Iterator[str]:
    wrong = sum(bool(one.rescale[0] == 0 or np.isnan(one.rescale).any()) for one in slices)
    if wrong:
        yield (
            f"RescaleSlope or RescaleIntercept is missing or zero in {wrong} of {len(slices)} slices: Hounsfield units "
            f"are unknown; export it again with them"
        )


def _units(slices: Sequence[Slice]) -> Iterator[str]:
    units = {str(one.value("RescaleType")).upper().strip() for one in slices} - {"NONE", "", "HU", "US"}
    if units:
        yield f"its values are {shown(sorted(units))} by RescaleType, not HU; choose the series of the CT itself"


def _pixels(slices: Sequence[Slice]) -> Iterator[str]:
    for keyword, allowed in (
        ("BitsAllocated", ("8", "16", "32")),
        ("PixelRepresentation", ("0", "1")),
        ("PhotometricInterpretation", ("MONOCHROME1", "MONOCHROME2")),
    ):
        wrong = sorted({str(one.value(keyword)) for one in slices} - set(allowed))
        if wrong:
            yield f"{keyword} must be one of {', '.join(allowed)}, got {shown(wrong)}; it is damaged or no CT"
    if any(one.file.pixels is not None and one.file.pixels.floating for one in slices):
        yield "its pixels are floating-point numbers, which images of CT scanners do not have; export it again"
    (x, y), z = slices[0].size, len(slices)
    if x * y * z > MAX_VOXELS:
        yield f"at most {MAX_VOXELS} voxels, its headers promise {x * y * z:.3g}; read a part of it"


def _transfer_syntaxes(slices: Sequence[Slice]) -> Iterator[str]:
    from pydicom.pixels import get_decoder

    for uid in sorted({one.file.syntax for one in slices} - {""}):
        try:
            available = uid in jpeg12.SYNTAXES or get_decoder(uid).is_available
        except NotImplementedError:
            available = False
        if not available:
            name = printable(pydicom.uid.UID(uid).name)[:LONGEST_TEXT]
            yield f"nothing here unpacks pixels of '{name}'; convert it to Explicit VR Little Endian"


def _lossy(slices: Sequence[Slice]) -> Iterator[str]:
    lossy = sum(str(one.value("LossyImageCompression")) == "01" for one in slices)
    if lossy:
        yield f"{lossy} of {len(slices)} slices were compressed with loss"


def _unspecified(slices: Sequence[Slice]) -> Iterator[str]:
    if any(str(one.value("RescaleType")).upper().strip() == "US" for one in slices):
        yield "RescaleType is 'US' (unspecified); its values are taken as Hounsfield units"


def _uneven_rescale(slices: Sequence[Slice]) -> Iterator[str]:
    if len({one.rescale for one in slices}) > 1:
        yield "slices have their own RescaleSlope and RescaleIntercept; each is applied to its slice"


_HEADER_CHECKS: dict[str, Callable[[Sequence[Slice]], Iterator[str]]] = {
    "single": _single,
    "position": _positions,
    "orientation": _axes,
    "pixel-spacing": _pixel_spacing,
    "frames": _placeless_frames,
    "frame-of-reference": _frames_of_reference,
    "rescale": _rescale,
    "units": _units,
    "pixels": _pixels,
    "syntax": _transfer_syntaxes,
}
_HEADER_NOTES: dict[str, Callable[[Sequence[Slice]], Iterator[str]]] = {
    "study": _studies,
    "lossy": _lossy,
    "units": _unspecified,
    "rescale": _uneven_rescale,
}
