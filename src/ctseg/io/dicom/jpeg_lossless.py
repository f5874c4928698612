"""Lossless JPEG by imagecodecs, with a proof that the pixels account for the whole codestream.

GDCM makes up what a damaged scan lacks and only warns, and it lets no other thread run meanwhile. The decoder here is
quicker but checks no more, so its pixels are counted back: the codestream's tables say how many bits each difference
from its prediction took (ITU-T T.81, annex H), and all of them together must fill the scan to its last byte.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from ctseg.errors import ImageError
from ctseg.io.dicom.codestream import HUFFMAN_TABLES, SCAN, Segment, huffman_code_lengths, jpeg_segments

SYNTAXES = ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")
"""Any predictor, and the first one."""

_FRAME_HEADER = 0xC3
_RESTART_INTERVAL = 0xDD
_END = 0xD9
_IMPOSSIBLE_BITS = 10**5
_DAMAGED = "its lossless JPEG is damaged: {}; copy it again from its source"

_Plane = NDArray[np.int32]
_PREDICTORS: dict[int, Callable[[_Plane, _Plane, _Plane], _Plane]] = {
    1: lambda left, above, corner: left,
    2: lambda left, above, corner: above,
    3: lambda left, above, corner: corner,
    4: lambda left, above, corner: left + above - corner,
    5: lambda left, above, corner: left + ((above - corner) >> 1),
    6: lambda left, above, corner: above + ((left - corner) >> 1),
    7: lambda left, above, corner: (left + above) >> 1,
}
"""Of a pixel, from those to its left, above it, and above to the left; the first row and column have their own."""


def is_simple(frame: bytes) -> bool:
    """Whether `decode` can unpack and judge a codestream; needs imagecodecs.

    It has all bits in one scan without restarts, and one of its longest codes is unused, as the standard asks: if
    more were, a decoder could make anything of those.
    """
    segments = list(jpeg_segments(frame))
    kinds = [segment.marker for segment in segments]
    scan = segments[-1].body if kinds[-1:] == [SCAN] else b""
    if len(scan) != 6 or scan[3] not in _PREDICTORS or scan[4:] != b"\0\0":
        return False
    lengths = _code_lengths(segments).values()
    reserved = 2.0 ** -max(lengths, default=0)
    return (
        sum(2.0**-length for length in lengths) == 1 - reserved
        and kinds.count(_FRAME_HEADER) == 1
        and _RESTART_INTERVAL not in kinds
        and find_spec("imagecodecs") is not None
    )


def decode(frame: bytes, size: tuple[int, int]) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """The stored pixels `[y, x]` of a codestream of which `is_simple` holds, bytes up to 8 bits.

    Args:
        frame: The codestream; `check_codestream` has passed it.
        size: Columns, rows.

    Raises:
        ImageError: if the pixels are not what was packed.
    """
    import imagecodecs

    try:
        stored = imagecodecs.ljpeg_decode(frame)
    except Exception as error:
        raise ImageError(_DAMAGED.format("it cannot be unpacked")) from error
    if stored.shape != size[::-1]:
        raise ImageError(_DAMAGED.format(f"it unpacks to {stored.shape[::-1]}, not {size}"))
    segments = list(jpeg_segments(frame))
    bits = _frame_header(segments)[0]
    if stored.max() >= 2**bits:
        raise ImageError(_DAMAGED.format(f"values of more than {bits} bits"))
    have = _scan_bits(frame, segments[-1].end)
    used = _bits_of(stored, segments)
    if not 0 <= have - used < 8:
        raise ImageError(_DAMAGED.format(f"its pixels take {used} bits of the {have} it has"))
    return stored


def _scan_bits(frame: bytes, start: int) -> int:
    """How many bits the scan holds that starts at a byte and goes to the end marker.

    Raises:
        ImageError: if another marker comes before it.
    """
    code = np.frombuffer(frame, np.uint8)[start:]
    ones = np.flatnonzero(code[:-1] == 0xFF)
    next_bytes = code[ones + 1]
    markers = np.flatnonzero((next_bytes != 0) & (next_bytes != 0xFF))  # ones fill up before a marker
    if len(markers) == 0 or next_bytes[markers[0]] != _END:
        raise ImageError(_DAMAGED.format("it has no end"))
    last = markers[0]
    stuffed = int(np.count_nonzero(next_bytes[:last] == 0))  # a zero behind each byte of ones
    fill = last - stuffed
    return 8 * int(ones[last] - stuffed - fill)


def _bits_of(stored: NDArray[np.uint8] | NDArray[np.uint16], segments: list[Segment]) -> int:
    """How many bits these pixels take when packed as the segments say.

    Raises:
        ImageError: if those give codes to more bits than a difference can have.
    """
    costs = np.full(17, _IMPOSSIBLE_BITS, np.int32)
    for category, length in _code_lengths(segments).items():
        if category >= len(costs):
            raise ImageError(_DAMAGED.format(f"differences of {category} bits"))
        costs[category] = length + category % 16  # of the 16th category there is one difference only
    differences = _differences(stored, _frame_header(segments)[0], segments[-1].body[3])
    return int(costs[_categories()][differences].sum(dtype=np.int64))


def _frame_header(segments: list[Segment]) -> bytes:
    """It begins with the bits of a value."""
    return next(segment.body for segment in segments if segment.marker == _FRAME_HEADER)


def _code_lengths(segments: list[Segment]) -> dict[int, int]:
    """How many bits the code of each number of bits has, in the scan that ends the segments."""
    lengths: dict[int, int] = {}
    for segment in segments:
        if segment.marker == HUFFMAN_TABLES:
            lengths = (huffman_code_lengths(segment.body) or {}).get(segments[-1].body[2] >> 4, lengths)
    return lengths


def _differences(stored: NDArray[np.uint8] | NDArray[np.uint16], precision: int, predictor: int) -> NDArray[np.uint16]:
    """Each pixel less its prediction, modulo 2^16."""
    if predictor == 1:
        values = stored.astype(np.uint16, copy=False)
        result = np.empty_like(values)
        np.subtract(values[:, 1:], values[:, :-1], out=result[:, 1:])
    else:
        wide = stored.astype(np.int32)
        predicted = wide.copy()
        predicted[0, 1:] = wide[0, :-1]
        predicted[1:, 1:] = _PREDICTORS[predictor](wide[1:, :-1], wide[:-1, 1:], wide[:-1, :-1])
        result = (wide - predicted).astype(np.uint16)
    column = stored[:, 0].astype(np.int32)
    result[:, 0] = np.diff(column, prepend=1 << (precision - 1)).astype(np.uint16)
    return result


@functools.cache
def _categories() -> NDArray[np.uint8]:
    """The number of bits in each difference's magnitude, by the difference modulo 2^16."""
    magnitudes = np.abs(np.arange(2**16, dtype=np.uint16).view(np.int16).astype(np.int32))
    return np.frexp(magnitudes)[1].astype(np.uint8)
