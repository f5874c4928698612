"""Headers of DICOM files: read within bounds, whatever the file says.

The header of a file is read from its first bytes, eight times as many each time, until the pixel data or the end come.
What pydicom makes of hostile bytes can be any exception; it becomes an ImageError with the reason.
"""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from zipfile import BadZipFile

import pydicom
from pydicom.datadict import tag_for_keyword
from pydicom.filereader import read_partial
from pydicom.tag import BaseTag

from ctseg.errors import ImageError
from ctseg.io.dicom.files import Source
from ctseg.io.dicom.plain import FLOAT_PIXEL_TAGS, PIXEL_TAGS, UNDEFINED, plain_header
from ctseg.io.dicom.tags import FUNCTIONAL_GROUPS, SCANNED, tag_value, value_of
from ctseg.privacy import without_uids
from ctseg.progress import printable

FIRST_BYTES = 2**15
"""What is read of every file; most headers of CT are shorter."""
MAX_HEADER_BYTES = 2**28
"""A longer header is refused; the contours of the largest RTSTRUCT are some 100 MB."""
MAX_FILE_BYTES = 2**32
"""A larger file is not read whole, nor is more inflated."""

BROKEN_FILE = (ImageError, OSError, EOFError, ValueError, zlib.error, BadZipFile)
"""What opening, unpacking and parsing a broken file raises."""

_SCANNED_TAGS: list[BaseTag | int] = [tag for keyword in SCANNED if (tag := tag_for_keyword(keyword)) is not None]
_KEPT = frozenset((*_SCANNED_TAGS, 0x00080005))
"""With the character set that texts are in."""
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_EXPLICIT = b"1.2.840.10008.1.2.1\0\0\0"
_DIRECTORY = "1.2.840.10008.1.3.10"
_LONG_VRS = ("OB", "OD", "OF", "OL", "OV", "OW", "UN")


@dataclass(frozen=True)
class PixelPlace:
    """Where the pixel data are in a file.

    Attributes:
        offset: Of their first byte; in a deflated file, once inflated.
        length: In bytes, None where they are encapsulated (compressed).
        deflated: Whether the whole file is deflated.
    """

    offset: int
    length: int | None
    deflated: bool
    floating: bool = False
    """Whether they are floating-point numbers, which no image of a CT scanner has."""


@dataclass(frozen=True, eq=False)
class Header:
    """What a file says besides its pixels; the images of one file share it.

    Attributes:
        source: The file.
        scanned: The tags of SCANNED only, which are all that is read of thousands of files.
        pixels: Where the pixels are; None where it has none.
        syntax: The transfer syntax, empty where the file does not name it.
        little_endian: The order of its bytes.
    """

    source: Source
    scanned: pydicom.Dataset
    pixels: PixelPlace | None
    syntax: str
    little_endian: bool = True
    _values: dict[str, Any] = field(default_factory=dict, init=False)

    @cached_property
    def dataset(self) -> pydicom.Dataset:
        """Every tag, read when first asked for.

        Raises:
            ImageError: if the file can no longer be read.
        """
        try:
            found = _read(self.source, None)
        except BROKEN_FILE as error:
            raise ImageError(f"cannot read '{self.source.shown}': {reason(error)}") from error
        if found is None:
            raise ImageError(f"cannot read '{self.source.shown}': it has changed since it was listed; start again")
        return found.scanned

    def value(self, keyword: str, frame: int | None = None) -> Any:
        """The value of a tag: of `frame`, else shared by all frames, else of the file; None if it is not readable."""
        if frame is not None and keyword in FUNCTIONAL_GROUPS:
            return self._value(keyword, frame)
        if keyword not in self._values:
            self._values[keyword] = self._value(keyword, None)
        return self._values[keyword]

    def _value(self, keyword: str, frame: int | None) -> Any:
        try:
            return tag_value(self.scanned if keyword in SCANNED else self.dataset, keyword, frame)
        except ImageError:
            return None


def read_header(source: Source) -> Header | None:
    """The header of a file; None if it is not DICOM or a DICOMDIR.

    Raises:
        ImageError: if it is DICOM and broken.
    """
    return _read(source, _SCANNED_TAGS)


def _read(source: Source, tags: list[BaseTag | int] | None) -> Header | None:
    """The header of a file, of `tags` only if they are given."""
    num_bytes = source.num_bytes
    with source.open() as file:
        start = file.read(FIRST_BYTES)
        if not _looks_like_dicom(start):
            return None
        while True:
            header = _parse(source, start, tags)
            if header is not None and header.pixels is not None:
                break
            if len(start) >= num_bytes:
                break
            if len(start) >= MAX_HEADER_BYTES:
                raise ImageError(f"its header is longer than {MAX_HEADER_BYTES} bytes; it is damaged")
            more = file.read(min(len(start) * 7, MAX_HEADER_BYTES - len(start)))
            if not more:
                break
            start += more
    if header is None:
        raise ImageError("its header cannot be parsed; copy it again from its source")
    return header if _is_object(header, start) else None


def read_dataset(source: Source) -> pydicom.Dataset:
    """The whole data set of a file, pixels included, e.g. of a SEG or RTSTRUCT object.

    Raises:
        ImageError: if it is too large or broken.
    """
    data = read_bytes(source, MAX_FILE_BYTES)
    try:
        return pydicom.dcmread(io.BytesIO(data), force=True)
    except Exception as error:
        raise ImageError(f"cannot read '{source.shown}': {reason(error)}; copy it again from its source") from error


def read_bytes(source: Source, limit: int) -> bytes:
    """The bytes of a file, inflated if it is deflated as a whole.

    Raises:
        ImageError: if they are more than `limit`, or damaged.
    """
    try:
        with source.open() as file:
            data = file.read(limit + 1)
    except BROKEN_FILE as error:
        raise ImageError(f"cannot read '{source.shown}': {reason(error)}; copy it again from its source") from error
    data = _inflated(data, limit + 1)
    if len(data) > limit:
        raise ImageError(f"cannot read '{source.shown}': more than {limit} bytes, more than its header promises")
    return data


def reason(error: BaseException) -> str:
    """What an exception says, in one line, bounded, without UIDs and names of files."""
    says = (isinstance(error, OSError) and error.strerror) or str(error)  # an OSError's text has the file's name
    if isinstance(error, BadZipFile):
        says = "the archive is damaged"  # its text has the member's name
    text = " ".join(str(says).split())
    return printable(without_uids(text[:300])).rstrip(".") or type(error).__name__


def _looks_like_dicom(start: bytes) -> bool:
    """True for a preamble with DICM, or none and a first element of group 0002 or 0008, in either byte order."""
    if start[128:132] == b"DICM":
        return True
    little = start[:2] in (b"\x02\0", b"\x08\0") and start[3:4] == b"\0"
    big = start[:2] in (b"\0\x02", b"\0\x08") and start[2:3] == b"\0"
    return len(start) > 16 and (little or big)


def _parse(source: Source, start: bytes, tags: list[BaseTag | int] | None) -> Header | None:
    """The header in the first bytes of a file; without pixels if they end before; None if it makes no sense."""
    plain = plain_header(start, _KEPT) if tags is not None else None
    if plain is not None:
        scanned = pydicom.Dataset(plain.elements)
        return Header(source, scanned, PixelPlace(plain.offset, plain.length, False), plain.syntax)
    data = _inflated(start, MAX_HEADER_BYTES)
    stopped: list[tuple[int, str | None, int]] = []

    def at_pixels(tag: int, vr: str | None, length: int) -> bool:
        if tag not in PIXEL_TAGS:
            return False
        stopped.append((tag, vr, length))
        return True

    buffer = io.BytesIO(data)
    try:
        dataset = read_partial(buffer, at_pixels, force=True, specific_tags=tags)
    except Exception:  # also a header that goes on after these bytes
        return None
    place = None
    if stopped:
        tag, vr, length = stopped[-1]
        offset = buffer.tell() + (12 if vr in _LONG_VRS else 8)
        place = PixelPlace(offset, None if length == UNDEFINED else length, data is not start, tag in FLOAT_PIXEL_TAGS)
    syntax = str(value_of(dataset.file_meta, "TransferSyntaxUID") or "")
    return Header(source, dataset, place, syntax, dataset.original_encoding[1] in (True, None))


def is_deflated(start: bytes) -> bool:
    """Whether what a file begins with says that the rest is packed."""
    end = 144 + int.from_bytes(start[140:144], "little")
    return start[128:138] == b"DICM\x02\0\0\0UL" and _DEFLATED in start[144 : min(end, 2**16)]


def _inflated(data: bytes, limit: int) -> bytes:
    """A deflated file as an explicit little endian one, at most `limit` bytes; any other as it is."""
    if not is_deflated(data):
        return data
    end = 144 + int.from_bytes(data[140:144], "little")
    head = data[:end].replace(_DEFLATED, _EXPLICIT)
    try:
        return head + zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[end:], limit)
    except zlib.error as error:
        raise ImageError(f"its deflated data are damaged ({error}); copy it again from its source") from error


def _is_object(header: Header, start: bytes) -> bool:
    """False for a directory of files, and for bytes without preamble that name no SOP class of the standard."""
    meta = getattr(header.scanned, "file_meta", None)
    if meta is not None and str(value_of(meta, "MediaStorageSOPClassUID")) == _DIRECTORY:
        return False
    sop_class = str(value_of(header.scanned, "SOPClassUID") or "")
    if start[128:132] != b"DICM":
        return sop_class.startswith("1.2.840.10008.5.1.4.")
    if not sop_class and header.pixels is None:
        raise ImageError("it ends before its header says what it is; copy it again from its source")
    return True
