"""The pixels of a SEG, whatever they are packed in: what pydicom decodes, and what it does not."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels import get_decoder, iter_pixels, pixel_array
from pydicom.uid import RLELossless

from ctseg.errors import ImageError
from ctseg.io.dicom.codestream import check_codestream

DEFLATED_FRAMES = "1.2.840.10008.1.2.8.1"
"""Deflated Image Frame Compression, which pydicom does not know yet."""


def decode(dataset: pydicom.Dataset, indices: list[int]) -> Iterator[NDArray[Any]]:
    """The stored values `[row, column]` of the frames `indices`, one at a time.

    Raises:
        ImageError: if the pixels are truncated, damaged or packed in a way that cannot be undone.
    """
    if not indices:
        return
    try:
        yield from _decode(dataset, indices)
    except ImageError:
        raise
    except Exception as error:  # a stranger's bytes: decoders raise anything
        raise ImageError(f"its pixels cannot be decoded ({error!s:.120}); copy it again from its source") from error


def _decode(dataset: pydicom.Dataset, indices: list[int]) -> Iterator[NDArray[Any]]:
    syntax = dataset.file_meta.TransferSyntaxUID
    bits = int(dataset.BitsAllocated)
    if syntax == DEFLATED_FRAMES or (syntax == RLELossless and bits == 1):
        yield from (_unpacked(dataset, _inflated(dataset, index, bits), bits) for index in indices)
    elif bits > 1 or syntax.is_encapsulated:
        if syntax.is_encapsulated and syntax != RLELossless:
            for index in indices:
                frame = get_frame(dataset.PixelData, index, number_of_frames=int(dataset.NumberOfFrames))
                check_codestream(frame, (int(dataset.Columns), int(dataset.Rows)), bits)
        yield from iter_pixels(dataset, indices=indices, raw=True)
    elif syntax.is_little_endian:
        yield from (_unpacked(dataset, *_bits_of_frame(dataset, index)) for index in indices)
    else:
        frames = pixel_array(dataset, raw=True).reshape(-1, int(dataset.Rows), int(dataset.Columns))
        yield from (frames[index] for index in indices)


def _bits_of_frame(dataset: pydicom.Dataset, index: int) -> tuple[bytes, int, int]:
    """The bytes that hold one frame of single bits, 1, and where in them it begins.

    Frames follow each other without a break; pydicom loses bits of one that begins within a byte.
    """
    size = int(dataset.Rows) * int(dataset.Columns)
    begin, end = index * size, (index + 1) * size
    return dataset.PixelData[begin // 8 : -(-end // 8)], 1, begin % 8


def _inflated(dataset: pydicom.Dataset, index: int, bits: int) -> bytes:
    """The bytes of a frame that is compressed by itself; no more than it has room for."""
    num_bytes = -(-int(dataset.Rows) * int(dataset.Columns) * bits // 8)
    packed = get_frame(dataset.PixelData, index, number_of_frames=int(dataset.NumberOfFrames))
    if dataset.file_meta.TransferSyntaxUID == DEFLATED_FRAMES:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, num_bytes)
    shape = {"rows": 1, "columns": num_bytes, "bits_allocated": 8, "bits_stored": 8, "number_of_frames": 1}
    plain = {"samples_per_pixel": 1, "photometric_interpretation": "MONOCHROME2", "pixel_representation": 0}
    decoder = get_decoder(RLELossless)  # which takes the packed bits for pixels of a byte
    data, _ = decoder.as_buffer(encapsulate([packed]), **shape, **plain, pixel_keyword="PixelData")
    return bytes(data)


def _unpacked(dataset: pydicom.Dataset, data: bytes, bits: int, begin: int = 0) -> NDArray[Any]:
    """The pixels in the bytes of a frame, whose first bit is `begin`.

    Raises:
        ImageError: if there are too few.
    """
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    if len(data) * 8 < begin + rows * columns * bits:
        raise ImageError(f"truncated: a frame of {columns} x {rows} pixels has {len(data)} bytes")
    if bits > 1:
        return np.frombuffer(data, f"<u{bits // 8}", rows * columns).reshape(rows, columns)
    values = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    return values[begin : begin + rows * columns].reshape(rows, columns)
