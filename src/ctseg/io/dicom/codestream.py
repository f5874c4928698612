"""What a compressed image says about itself, before a decoder believes it.

GDCM ends the process when the markers of a JPEG are broken, and every decoder allocates what a codestream promises.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ctseg.errors import ImageError

_FRAME_HEADERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
"""Start of frame: every kind of JPEG, and JPEG-LS; without tables and extensions between them."""
HUFFMAN_TABLES = 0xC4
_JFIF = 0xE0
_OTHER_SEGMENTS = {HUFFMAN_TABLES, 0xCC, 0xDB, 0xDD, 0xF8, 0xFE, *range(0xE0, 0xF0)}
"""What else may come before the first scan: tables, restart interval, JPEG-LS parameters, comments, applications."""
SCAN = 0xDA
_JPEG2000 = b"\xff\x4f\xff\x51"


def check_codestream(data: bytes, size: tuple[int, int], bits_allocated: int) -> int:
    """The bits per pixel of a JPEG, JPEG-LS or JPEG 2000 codestream that is what its header promises.

    Args:
        data: The codestream. It must be grey and whole up to its scan.
        size: Columns, rows.
        bits_allocated: What a pixel takes once unpacked; the bits of the codestream, rounded up to bytes.

    Raises:
        ImageError: saying what is wrong.
    """
    if data[4:8] == b"jP  ":  # a JP2 file where the standard asks for its codestream only; decoders take both
        data = data[max(0, data.find(_JPEG2000, 0, 1024)) :]
    if data[:4] == _JPEG2000:
        x_end, y_end, x_start, y_start = (int.from_bytes(data[n : n + 4], "big") for n in (8, 12, 16, 20))
        found, components = (x_end - x_start, y_end - y_start), int.from_bytes(data[40:42], "big")
        precision = (data[42] & 0x7F) + 1 if len(data) > 42 else 0
    elif data[:2] == b"\xff\xd8":
        found, components, precision = _jpeg_frame(data)
    else:
        raise ImageError("its compressed pixels are no JPEG of any kind; copy it again from its source")
    if found != size or components != 1:
        raise ImageError(
            f"its compressed pixels are {found[0]} x {found[1]} of {components} colours, its header promises "
            f"{size[0]} x {size[1]} of 1; copy it again from its source"
        )
    if bits_allocated not in (-(-precision // 8) * 8, precision):
        raise ImageError(
            f"its compressed pixels have {precision} bits, its header promises {bits_allocated}; copy it again from "
            f"its source"
        )
    return precision


def _jpeg_frame(data: bytes) -> tuple[tuple[int, int], int, int]:
    """(columns, rows), components and bits of the one frame header; all segments up to the first scan must be sound."""
    frame = b""
    for marker, body, _ in jpeg_segments(data):
        if marker == SCAN and frame and body and len(body) == 4 + 2 * body[0]:
            rows, columns = (int.from_bytes(frame[n : n + 2], "big") for n in (1, 3))
            return (columns, rows), frame[5], frame[0]
        if marker in _FRAME_HEADERS and not frame and len(body) >= 6 and len(body) == 6 + 3 * body[5]:
            frame = body
        elif marker == _JFIF and body[:5] == b"JFIF\0" and body[5:6] != b"\x01":
            break  # GDCM ends the process over another version
        elif marker not in _OTHER_SEGMENTS or (marker == HUFFMAN_TABLES and huffman_code_lengths(body) is None):
            break
    raise ImageError("the markers of its JPEG are damaged; copy it again from its source")


class Segment(NamedTuple):
    """A part of a JPEG: its marker's second byte, what follows the length, and where that ends in the codestream."""

    marker: int
    body: bytes
    end: int


def jpeg_segments(data: bytes) -> Iterator[Segment]:
    """The segments of a JPEG up to its first scan's header, or to the first one that is not whole."""
    place, marker = 2, 0
    while marker != SCAN and data[place : place + 1] == b"\xff":
        while data[place + 1 : place + 2] == b"\xff":  # a marker may have any number of these in front
            place += 1
        marker = int.from_bytes(data[place + 1 : place + 2], "big")
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        body = data[place + 4 : place + 2 + length]
        place += 2 + length
        if length < 2 or len(body) != length - 2:
            return
        yield Segment(marker, body, place)


def huffman_code_lengths(body: bytes) -> dict[int, dict[int, int]] | None:
    """The tables of a segment: by class and number, how many bits the code of each symbol has.

    None if tables (16 counts and as many symbols, each) do not fill it, if a symbol has two codes, or if so many codes
    of these lengths do not exist.
    """
    tables: dict[int, dict[int, int]] = {}
    place = 0
    while place < len(body):
        counts = body[place + 1 : place + 17]
        symbols = body[place + 17 : place + 17 + sum(counts)]
        if body[place] & 0xEC or len(set(symbols)) < sum(counts) or not _are_codes(counts):
            return None
        lengths = (length for length, count in enumerate(counts, start=1) for _ in range(count))
        tables[body[place]] = dict(zip(symbols, lengths, strict=True))
        place += 17 + sum(counts)
    return tables


def _are_codes(counts: bytes) -> bool:
    """True if so many codes of 1, 2, ... 16 bits exist."""
    code = 0
    for length, count in enumerate(counts, start=1):
        code += count
        if code > 1 << length:
            return False
        code <<= 1
    return len(counts) == 16
