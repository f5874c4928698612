"""File formats: the only place that knows how a volume lies on disk. Import `images`; it chooses the format.

What the formats share is here: the header they all read, and one stream of voxels. The stream unpacks straight into one
array of the stored type and runs to the end of the file, so that a truncated or damaged file is an error and not a
picture. Below `images`, an ImageError holds the reason only; `images` adds the path.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from isal import igzip, isal_zlib
from numpy.typing import NDArray

from ctseg.errors import ImageError
from ctseg.scratch import in_slabs, new_array, release
from ctseg.volume import Geometry

MAX_VOXELS = 2**31
"""A header that promises more is refused before anything is allocated; whole-body CT has a tenth of it."""
MAX_SKIPPED_BYTES = 2**28
"""Before the voxels; a header that puts them further back would have that much unpacked for nothing."""
MAX_DEFLATE_RATIO = 1032
"""Deflate packs at most this many bytes into one; a header that promises more is false."""

_CHUNK_BYTES = 2**18
_BROKEN_DATA: tuple[type[Exception], ...] = (gzip.BadGzipFile, isal_zlib.error)  # type: ignore[assignment]  # its stub
_DAMAGED = "copy it again from its source"


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says about its voxels.

    Attributes:
        problems: Every rule the header breaks; the other attributes count only where this is empty.
        geometry: The grid.
        dtype: Type of the stored voxels, with their byte order.
        encoding: How the bytes from `file_offset` on are packed: "raw", "gzip" or "zlib".
        file_offset: Where the packed bytes begin in the file.
        skip: Where the voxels begin in the unpacked bytes.
        slope: Stored value x slope + intercept = Hounsfield units.
        intercept: See slope.
    """

    problems: list[str]
    geometry: Geometry
    dtype: np.dtype[Any]
    encoding: str
    file_offset: int = 0
    skip: int = 0
    slope: float = 1.0
    intercept: float = 0.0


@dataclass(frozen=True)
class Extent:
    """What reading a CT takes, by its header.

    Attributes:
        geometry: Its grid.
        held_bytes: Of the voxels once they are read.
        reading_bytes: Of memory more, while they are read into memory.
        movable: Whether they can be read to disk instead, see `ctseg.scratch`.
    """

    geometry: Geometry
    held_bytes: int
    reading_bytes: int = 0
    movable: bool = True


def data_problems(
    size: tuple[int, int, int], dtype: np.dtype[Any], encoding: str, packed_bytes: int, skip: int = 0
) -> list[str]:
    """A line if a header promises more than MAX_VOXELS, or what `packed_bytes` of file cannot be."""
    voxels = math.prod(size)
    if voxels > MAX_VOXELS:
        return [f"at most {MAX_VOXELS} voxels, its header promises {voxels:.3g}; crop it, or copy it again if damaged"]
    promised = skip + voxels * dtype.itemsize
    if encoding == "raw" and promised != packed_bytes:
        what = "truncated" if promised > packed_bytes else "something follows the voxels"
        return [f"{what}: its header promises {promised} bytes, the file has {packed_bytes}; {_DAMAGED}"]
    if encoding != "raw" and promised > MAX_DEFLATE_RATIO * packed_bytes:
        return [f"its header promises {promised} bytes, {packed_bytes} compressed bytes cannot hold them; {_DAMAGED}"]
    if skip > MAX_SKIPPED_BYTES:
        return [f"the voxels must begin in the first {MAX_SKIPPED_BYTES} bytes, got byte {skip}; {_DAMAGED}"]
    return []


def read_array(path: Path, header: Header, scratch: Path | None = None) -> NDArray[Any]:
    """The voxels as stored, `[x, y, z]` in Fortran order and native byte order, without scaling.

    Call it only with a header that has no problems: the array is allocated from what the header says, on disk if
    there is a folder for it.

    Raises:
        ImageError: if there are fewer or more bytes than the header promises, or a checksum is wrong.
    """
    array: NDArray[Any] = new_array(header.geometry.size[::-1], header.dtype, scratch).T
    target = array.T.reshape(-1).view(np.uint8)
    filled = 0
    with path.open("rb") as file, stream_errors():
        file.seek(header.file_offset)
        for chunk in _chunks(file, header):
            if filled + len(chunk) > len(target):
                raise ImageError(f"more data than the {len(target)} bytes its header promises; {_DAMAGED}")
            part = target[filled : filled + len(chunk)]
            part[:] = np.frombuffer(chunk, np.uint8)
            release(part)
            filled += len(chunk)
    if filled < len(target):
        raise ImageError(f"truncated: {filled} of {len(target)} bytes of voxels; {_DAMAGED}")
    if not header.dtype.isnative:
        for slab in in_slabs(array):
            slab.byteswap(inplace=True)
        array = array.view(header.dtype.newbyteorder("="))
    return array


@contextmanager
def stream_errors() -> Iterator[None]:
    """Turns what igzip raises on broken data into an ImageError."""
    try:
        yield
    except EOFError as error:
        raise ImageError(f"truncated: the compressed data end early; {_DAMAGED}") from error
    except _BROKEN_DATA as error:
        raise ImageError(f"the compressed data are damaged ({error}); {_DAMAGED}") from error


def gzip_writer(file: IO[bytes]) -> IO[bytes]:
    """A gzip stream into `file` that holds no name and no time: equal voxels give equal bytes."""
    stream: IO[bytes] = igzip.IGzipFile(filename="", mode="wb", compresslevel=1, fileobj=file, mtime=0)
    return stream


def in_file_order(array: NDArray[Any]) -> Iterator[memoryview]:
    """The little-endian bytes of an `[x, y, z]` array with x fastest, slice by slice; Fortran order is not copied."""
    little = array.dtype.newbyteorder("<")
    for z in range(array.shape[2]):
        plane = array[:, :, z]
        yield np.ascontiguousarray(plane.T, dtype=little).reshape(-1).view(np.uint8).data
        release(plane)


def _chunks(file: IO[bytes], header: Header) -> Iterator[bytes]:
    """The unpacked bytes of the voxels, to the end of the file."""
    if header.encoding == "zlib":
        yield from _inflate(file)
        return
    stream = igzip.IGzipFile(fileobj=file, mode="rb") if header.encoding == "gzip" else file
    stream.seek(stream.tell() + header.skip)
    while chunk := stream.read(_CHUNK_BYTES):
        yield chunk


def _inflate(file: IO[bytes]) -> Iterator[bytes]:
    stream = isal_zlib.decompressobj()
    while not stream.eof:
        packed = stream.unconsumed_tail or file.read(_CHUNK_BYTES)
        chunk = stream.decompress(packed, _CHUNK_BYTES)
        if not packed and not chunk:
            raise EOFError
        yield chunk
    if stream.unused_data or file.read(1):
        raise ImageError(f"something follows the compressed voxels; {_DAMAGED}")
