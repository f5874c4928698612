"""What a compressed image says about itself, before a decoder believes it.

GDCM ends the process when the markers of a JPEG are broken, and every decoder allocates what a codestream promises.
"""

from __future__ import annotations

from ctseg.errors import ImageError

_FRAME_HEADERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
"""Start of frame: every kind of JPEG, and JPEG-LS; without tables and extensions between them."""
_HUFFMAN_TABLES = 0xC4
_JFIF = 0xE0
_OTHER_SEGMENTS = {_HUFFMAN_TABLES, 0xCC, 0xDB, 0xDD, 0xF8, 0xFE, *range(0xE0, 0xF0)}
"""What else may come before the first scan: tables, restart interval, JPEG-LS parameters, comments, applications."""
_SCAN = 0xDA
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
    place = 2
    while data[place : place + 1] == b"\xff":
        while data[place + 1 : place + 2] == b"\xff":  # a marker may have any number of these in front
            place += 1
        marker = int.from_bytes(data[place + 1 : place + 2], "big")
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        segment = data[place + 4 : place + 2 + length]
        place += 2 + length
        if length < 2 or len(segment) != length - 2:
            break
        if marker == _SCAN and frame and len(segment) == 4 + 2 * segment[0]:
            rows, columns = (int.from_bytes(frame[n : n + 2], "big") for n in (1, 3))
            return (columns, rows), frame[5], frame[0]
        if marker in _FRAME_HEADERS and not frame and len(segment) >= 6 and len(segment) == 6 + 3 * segment[5]:
            frame = segment
        elif marker == _JFIF and segment[:5] == b"JFIF\0" and segment[5:6] != b"\x01":
            break  # GDCM ends the process over another version
        elif marker not in _OTHER_SEGMENTS or (marker == _HUFFMAN_TABLES and not _are_tables(segment)):
            break
    raise ImageError("the markers of its JPEG are damaged; copy it again from its source")


def _are_tables(segment: bytes) -> bool:
    """True if Huffman tables fill a segment: a class and number, 16 counts and as many symbols, each."""
    place = 0
    while place < len(segment):
        counts = segment[place + 1 : place + 17]
        if segment[place] & 0xEC or sum(counts) > 256 or not _are_codes(counts):
            return False
        place += 17 + sum(counts)
    return place == len(segment)


def _are_codes(counts: bytes) -> bool:
    """True if so many codes of 1, 2, ... 16 bits exist."""
    code = 0
    for length, count in enumerate(counts, start=1):
        code += count
        if code > 1 << length:
            return False
        code <<= 1
    return True
