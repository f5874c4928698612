"""From stored pixels to Hounsfield units, straight into one array.

Uncompressed pixels are copied from the file; everything else is unpacked by pydicom's decoders.
"""

from __future__ import annotations

import hashlib
import io
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.uid import RLELossless

from ctseg.errors import ImageError
from ctseg.io.dicom import jpeg12, jpeg_lossless
from ctseg.io.dicom.codestream import check_codestream
from ctseg.io.dicom.frames import integer
from ctseg.io.dicom.headers import MAX_FILE_BYTES, PixelPlace, read_bytes, reason
from ctseg.io.dicom.series import Slice
from ctseg.scratch import new_array, release
from ctseg.workers import free_threads, in_threads

MAX_THREADS = 8
"""More do not make a local disk faster."""

_PREFERRED = {
    "1.2.840.10008.1.2.4.50": "pillow",
    "1.2.840.10008.1.2.4.51": "pillow",
    "1.2.840.10008.1.2.4.80": "pyjpegls",
    "1.2.840.10008.1.2.4.81": "pyjpegls",
    "1.2.840.10008.1.2.4.90": "pylibjpeg",
    "1.2.840.10008.1.2.4.91": "pylibjpeg",
}
"""The decoder of each transfer syntax where several are there: the one that refuses damaged data most reliably.

For JPEG 2000 that is imagecodecs too, and it is faster; where it is not installed, pylibjpeg.
"""


MAX_AFTER_PIXELS = 2**20
"""Bytes that may follow the pixels in a deflated file, which is unpacked as a whole."""


class _TooWideError(Exception):
    """A value does not fit the integers of the array."""


@dataclass(frozen=True, eq=False)
class Voxels:
    """The voxels of a series.

    Attributes:
        array: Hounsfield units `[x, y, z]` in Fortran order; planes without a slice are unset.
        low: The smallest value.
        high: The largest value.
        num_padding: How many voxels hold the padding value.
    """

    array: NDArray[Any]
    low: float
    high: float
    num_padding: int


def read_voxels(slices: Sequence[Slice], planes: Sequence[int], num_planes: int, scratch: Path | None = None) -> Voxels:
    """The voxels of slices, slice n at z = planes[n] of `num_planes`; on the disk of a folder `scratch`, if given.

    The type is int16 where every value is a whole number that fits, else int32, else float32.

    Raises:
        ImageError: naming the file whose pixels cannot be read.
    """
    size = (*slices[0].size, num_planes)
    whole = all(value.is_integer() for one in slices for value in one.rescale)
    for dtype in (np.int16, np.int32, np.float32) if whole else (np.float32,):
        try:
            array: NDArray[Any] = new_array(size[::-1], dtype, scratch).T
            return _fill(array, slices, planes)
        except _TooWideError:
            continue
        except MemoryError as error:
            raise ImageError(f"not enough memory for {' x '.join(map(str, size))} voxels; free some") from error
    raise AssertionError("float32 holds any value")


def stored_pixels(
    slices: Sequence[Slice], room: Sequence[NDArray[Any]] | None = None
) -> Iterator[tuple[Slice, NDArray[Any]]]:
    """Each slice of one file with its stored pixels `[y, x]`, in the order of its frames.

    Args:
        slices: Of one file.
        room: For each slice an array `[y, x]` that may be used to read its pixels into, and is then their memory.

    Raises:
        ImageError: naming the file.
    """
    source = slices[0].source
    try:
        yield from _encapsulated(slices) if _place(slices[0]).length is None else _native(slices, room)
    except ImageError as error:
        raise ImageError(f"cannot read '{source.shown}': {error}") from error
    except Exception as error:  # decoders raise anything on hostile bytes
        raise ImageError(
            f"cannot read '{source.shown}': its pixels are damaged ({reason(error)}); copy it again"
        ) from error


def pixel_digests(slices: Sequence[Slice]) -> dict[Slice, bytes]:
    """For each slice a digest of its stored values: equal if and only if they are. Each file is read once.

    Raises:
        ImageError: naming the file whose pixels cannot be read.
    """
    return {
        one: hashlib.sha256(stored.astype("<i8").tobytes()).digest()
        for of_file in _by_file(slices)
        for one, stored in stored_pixels(of_file)
    }


def padding_range(one: Slice) -> tuple[int, int] | None:
    """The stored values of padding, lowest and highest; None if there is none."""
    ends = [_stored_integer(one, keyword) for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    known = [end for end in ends if end is not None]
    return (min(known), max(known)) if ends[0] is not None else None


def _fill(array: NDArray[Any], slices: Sequence[Slice], planes: Sequence[int]) -> Voxels:
    """Decodes every slice into its plane, files in parallel."""
    plane_of = dict(zip(map(id, slices), planes, strict=True))

    def decode(of_file: list[Slice]) -> list[tuple[float, float, int]]:
        facts = []
        targets = [array.T[plane_of[id(one)]] for one in of_file]
        for (one, stored), plane in zip(stored_pixels(of_file, targets), targets, strict=True):
            padding = _count_padding(stored, one)
            facts.append((*_to_hounsfield(stored, one.rescale, plane), padding))
            release(plane)
        return facts

    of_files = in_threads(decode, _by_file(slices), free_threads(MAX_THREADS))
    done = [facts for of_file in of_files for facts in of_file]
    lows, highs, padding = zip(*done, strict=True)
    return Voxels(array, min(lows), max(highs), sum(padding))


def _by_file(slices: Sequence[Slice]) -> list[list[Slice]]:
    """The slices of each file, in the order of its frames."""
    files: dict[tuple[str, str | None], list[Slice]] = defaultdict(list)
    for one in slices:
        files[str(one.source.path), one.source.member].append(one)
    return [sorted(of_file, key=lambda one: one.frame or 0) for of_file in files.values()]


def _to_hounsfield(stored: NDArray[Any], rescale: tuple[float, float], out: NDArray[Any]) -> tuple[float, float]:
    """Puts stored x slope + intercept into `out`, both `[y, x]`; the smallest and the largest of them.

    `stored` may be the same memory as `out`.

    Raises:
        _TooWideError: if `out` is of integers that do not hold the result.
    """
    slope, intercept = rescale
    if out.dtype.kind == "f":
        out[...] = stored * slope + intercept
        return float(out.min()), float(out.max())
    low, high = sorted(int(end) * int(slope) + int(intercept) for end in (stored.min(), stored.max()))
    limits = np.iinfo(out.dtype)
    if low < limits.min or high > limits.max:
        raise _TooWideError
    if slope == 1 and stored.dtype.itemsize == out.dtype.itemsize and abs(intercept) <= limits.max:
        np.add(stored.view(out.dtype), out.dtype.type(intercept), out=out)  # wrapping is exact if the sums fit
    else:
        out[...] = stored.astype(np.int64) * int(slope) + int(intercept)
    return low, high


def _count_padding(stored: NDArray[Any], one: Slice) -> int:
    padding = padding_range(one)
    if padding is None:
        return 0
    low, high = padding
    return int(np.count_nonzero(stored == low if low == high else (stored >= low) & (stored <= high)))


def _stored_integer(one: Slice, keyword: str) -> int | None:
    """A tag that is stored as pixels are: its two bytes may have been read with the wrong sign."""
    value = one.value(keyword)
    number = int.from_bytes(value, "little") if isinstance(value, bytes) and len(value) == 2 else integer(value)
    if number is None or integer(one.value("BitsAllocated")) != 16:
        return number
    unsigned = number % 2**16
    return unsigned - 2**16 if integer(one.value("PixelRepresentation")) == 1 and unsigned >= 2**15 else unsigned


def _place(one: Slice) -> PixelPlace:
    if one.file.pixels is None:
        raise AssertionError("a slice has pixels")
    return one.file.pixels


def _native(slices: Sequence[Slice], room: Sequence[NDArray[Any]] | None) -> Iterator[tuple[Slice, NDArray[Any]]]:
    """Uncompressed pixels, read where they lie and, if their type is as wide, straight to where they go."""
    first = slices[0]
    dtype = _stored_type(first)
    columns, rows = first.size
    frame_bytes = columns * rows * dtype.itemsize
    promised = (integer(first.value("NumberOfFrames")) or 1) * frame_bytes
    held = _place(first).length or 0
    if held not in (promised, promised + promised % 2):
        fault = "truncated" if held < promised else "damaged header"
        raise ImageError(f"{fault}: {held} bytes of pixels, its header promises {promised}; copy it again")
    with _plain(first) as file:
        for index, one in enumerate(slices):
            target = None if room is None else room[index]
            if target is None or target.dtype.itemsize != dtype.itemsize:
                target = np.empty((rows, columns), dtype)
            file.seek(_place(first).offset + (one.frame or 0) * frame_bytes)
            if file.readinto(target.data.cast("B")) < frame_bytes:
                raise ImageError("truncated: the file ends before its pixels do; copy it again from its source")
            yield one, _significant(target.view(dtype).astype(dtype.newbyteorder("="), copy=False), one)
        while first.source.packed is not None and file.read(2**20):
            pass  # at the end of a member, the archive's checksum is looked at


def _plain(one: Slice) -> io.BufferedIOBase:
    if _place(one).deflated:
        end = _place(one).offset + (_place(one).length or 0)
        return io.BytesIO(read_bytes(one.source, min(MAX_FILE_BYTES, end + MAX_AFTER_PIXELS)))
    return one.source.open()


def _stored_type(one: Slice) -> np.dtype[Any]:
    allocated, signed = (integer(one.value(keyword)) for keyword in ("BitsAllocated", "PixelRepresentation"))
    order = "<" if one.file.little_endian else ">"
    return np.dtype(f"{order}{'i' if signed else 'u'}{(allocated or 16) // 8}")


def _significant(stored: NDArray[Any], one: Slice) -> NDArray[Any]:
    """The stored values without what lies in bits above or below them, e.g. overlays; the same array if none do."""
    allocated = 8 * stored.dtype.itemsize
    bits = integer(one.value("BitsStored")) or allocated
    high = integer(one.value("HighBit"))
    high = bits - 1 if high is None else high
    if not 1 <= bits <= high + 1 <= allocated:
        raise ImageError(f"BitsStored {bits} and HighBit {high} do not fit {allocated} bits; the header is damaged")
    limit = 2**bits // (2 if stored.dtype.kind == "i" else 1)
    if high == bits - 1 and stored.max() < limit and stored.min() >= limit - 2**bits:
        return stored
    shifted: NDArray[Any] = (stored << (allocated - 1 - high)) >> (allocated - bits)
    return shifted


def _encapsulated(slices: Sequence[Slice]) -> Iterator[tuple[Slice, NDArray[Any]]]:
    """Compressed pixels, unpacked by pydicom's decoders."""
    from pydicom.encaps import generate_frames, get_frame
    from pydicom.pixels import get_decoder

    from ctseg.io.dicom import jpeg2000

    first = slices[0]
    columns, rows = first.size
    frames = integer(first.value("NumberOfFrames")) or 1
    dtype = _stored_type(first)
    limit = _place(first).offset + 2 * frames * columns * rows * dtype.itemsize + 2**20
    dataset = pydicom.dcmread(io.BytesIO(read_bytes(first.source, min(limit, MAX_FILE_BYTES))), force=True)
    syntax = dataset.file_meta.TransferSyntaxUID
    bits: set[int] = set()
    simple = syntax in jpeg_lossless.SYNTAXES
    if syntax != RLELossless:
        allocated = 8 * dtype.itemsize
        for frame in generate_frames(dataset.PixelData, number_of_frames=frames):
            bits.add(check_codestream(frame, first.size, allocated))
            simple = simple and jpeg_lossless.is_simple(frame)
    indices = [one.frame or 0 for one in slices]
    own: Callable[[bytes], NDArray[Any]] | None = None
    if syntax in jpeg12.SYNTAXES and bits != {8}:
        if bits != {12}:
            raise ImageError(f"a JPEG of this kind has 8 or 12 bits, got {sorted(bits)}; copy it again from its source")
        own = partial(jpeg12.decode, syntax=syntax, size=first.size)
    elif simple:
        own = partial(jpeg_lossless.decode, size=first.size)
    if own is not None:
        for one, index in zip(slices, indices, strict=True):
            frame = get_frame(dataset.PixelData, index, number_of_frames=frames)
            yield one, _significant(own(frame).view(dtype.newbyteorder("=")), one)
        return
    decoder = get_decoder(syntax)
    plugin = jpeg2000.NAME if jpeg2000.is_available(syntax) else _PREFERRED.get(syntax, "")
    decoded = decoder.iter_array(dataset, indices=indices, raw=True, decoding_plugin=plugin)
    for one, (stored, _) in zip(slices, decoded, strict=True):
        if stored.shape != (rows, columns):
            raise ImageError(f"unpacked to {stored.shape[::-1]}, its header promises {columns} x {rows}; copy it again")
        yield one, _significant(stored, one)
