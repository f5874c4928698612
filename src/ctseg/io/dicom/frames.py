"""From a header to its images: one slice for a file of one image, one per frame of a multi-frame file.

What a header lacks is NaN here; `checks` says what that means for a series.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctseg.errors import ImageError
from ctseg.io.dicom.headers import Header
from ctseg.io.dicom.series import Slice
from ctseg.progress import printable

MAX_FRAMES = 2**16
"""A header that promises more frames is refused."""
LONGEST_TEXT = 64
"""A DICOM long string is no longer; what is, is cut."""
LARGEST = 1e6
"""No millimetre and no Hounsfield unit of a CT is larger."""
UNIT_TOLERANCE = 1e-3
"""How far direction cosines may be from unit length and right angles; they are made exact."""

_ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
_DENSITIES = {"NONE", "MIXED", "MEAN", "RESAMPLED", "FILTERED", "ENERGY_PROP_WT"}
"""What the fourth word of an Enhanced CT's ImageType may be; the others make maps, e.g. of blood flow."""
CT_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.2",  # CT Image
    _ENHANCED_CT,
    "1.2.840.10008.5.1.4.1.1.2.2",  # Legacy Converted Enhanced CT Image
}
_SECONDARY_CAPTURES = "1.2.840.10008.5.1.4.1.1.7"
_LOCALIZERS = {"LOCALIZER", "SCOUT", "TOPOGRAM", "SURVIEW"}


def kind_of(header: Header) -> str:
    """What the images of a header are: "CT" for slices that can become a volume, else a word or two that say what."""
    return _kind(
        str(header.value("Modality") or "no modality"),
        str(header.value("SOPClassUID") or ""),
        tuple(texts(header.value("ImageType"))),
        header.value("SamplesPerPixel") in (None, 1),
    )


@lru_cache
def _kind(modality: str, sop_class: str, image_type: tuple[str, ...], grey: bool) -> str:
    modality = printable(modality)[:LONGEST_TEXT]
    words = [part.upper().strip() for part in image_type]
    if sop_class.startswith(_SECONDARY_CAPTURES):
        return "secondary capture"
    if modality != "CT" or (sop_class and sop_class not in CT_CLASSES):
        return modality if modality != "CT" else "CT-derived object"
    if _LOCALIZERS & set(words):
        return "localizer"
    if sop_class == _ENHANCED_CT and len(words) > 3 and words[3] not in _DENSITIES:
        return "CT map"
    if not grey:
        return "colour image"
    return "CT"


def slices_of(header: Header) -> list[Slice]:
    """The images of a file.

    Raises:
        ImageError: if the file promises images that it does not hold.
    """
    columns, rows = (integer(header.value(keyword)) for keyword in ("Columns", "Rows"))
    if header.pixels is None or not columns or not rows or columns < 1 or rows < 1:
        raise ImageError("an image without pixels: cut short, or stripped of them; copy it again from its source")
    return [
        Slice(
            file=header,
            frame=frame,
            position_mm=numbers(header.value("ImagePositionPatient", frame), 3),
            axes=_unit_axes(numbers(header.value("ImageOrientationPatient", frame), 6).tobytes()),
            spacing_mm=_spacing(numbers(header.value("PixelSpacing", frame), 2)),
            size=(columns, rows),
            rescale=_rescale(header, frame),
        )
        for frame in _frames(header)
    ]


def numbers(value: Any, count: int) -> NDArray[np.float64]:
    """`count` numbers of a tag, or as many NaN if it does not hold them, or absurd ones."""
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    try:
        found = [float(v) for v in values]
    except (TypeError, ValueError):
        found = []
    sound = len(found) == count and all(abs(v) <= LARGEST for v in found)
    return np.array(found) if sound else np.full(count, np.nan)


def integer(value: Any) -> int | None:
    """A whole number of a tag, or None."""
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return None


def texts(value: Any) -> list[str]:
    """The words of a tag that may hold several."""
    if value is None:
        return []
    many = isinstance(value, Sequence) and not isinstance(value, str)
    return [str(part) for part in (value if many else [value])]


def _frames(header: Header) -> Sequence[int | None]:
    """The frames' numbers; None alone for a file of one image or of frames that have no place of their own."""
    groups = header.value("PerFrameFunctionalGroupsSequence")
    promised = integer(header.value("NumberOfFrames")) or 1
    if groups is None:
        return [None]
    if not isinstance(groups, Sequence) or promised != len(groups) or promised > MAX_FRAMES:
        held = len(groups) if isinstance(groups, Sequence) else 0
        raise ImageError(f"it promises {promised} frames and describes {held}; copy it again from its source")
    return range(promised)


@lru_cache
def _unit_axes(cosines: bytes) -> NDArray[np.float64]:
    """`(2, 3)` orthonormal row and column directions; NaN if the 6 cosines are not nearly so. Not to be changed."""
    axes = np.frombuffer(cosines).reshape(2, 3)
    products = axes @ axes.T
    if not np.abs(products - np.eye(2)).max() <= UNIT_TOLERANCE:
        exact = np.full((2, 3), np.nan)
    else:
        x = axes[0] / np.linalg.norm(axes[0])
        y = axes[1] - (axes[1] @ x) * x
        exact = np.stack([x, y / np.linalg.norm(y)])
    exact.flags.writeable = False
    return exact


def _spacing(between_rows_columns: NDArray[np.float64]) -> tuple[float, float]:
    y, x = between_rows_columns
    return (float(x), float(y)) if x > 0 and y > 0 else (np.nan, np.nan)


def _rescale(header: Header, frame: int | None) -> tuple[float, float]:
    slope, intercept = (
        float(numbers(header.value(keyword, frame), 1)[0]) for keyword in ("RescaleSlope", "RescaleIntercept")
    )
    return slope, intercept
