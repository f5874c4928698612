"""File formats: the only place that knows how a volume lies on disk. Import `images`; it chooses the format.

What the formats share is here: the header they all read, and one stream of voxels. The stream unpacks straight into one
array of the stored type and runs to the end of the file, so that a truncated or damaged file is an error and not a
picture. Below `images`, an ImageError holds the reason only; `images` adds the path.
"""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import numpy as np
from isal import igzip, isal_zlib
from numpy.typing import NDArray

from ctseg.ahead import take_unpacked
from ctseg.errors import ImageError
from ctseg.scratch import in_slabs, new_array, release
from ctseg.volume import Geometry, LabelStream, Volume

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
        streams: Whether it can be prepared while it is read, see `ctseg.io.stream`.
    """

    geometry: Geometry
    held_bytes: int
    reading_bytes: int = 0
    movable: bool = True
    streams: bool = False


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
    with closing(VoxelStream(path, header)) as stream:
        stream.fill(array.T)
        stream.end()
    if not header.dtype.isnative:
        for slab in in_slabs(array):
            slab.byteswap(inplace=True)
        array = array.view(header.dtype.newbyteorder("="))
    return array


class VoxelStream:
    """The voxels of a file as they are stored, from the first to the last.

    Methods raise ImageError if there are fewer or more bytes than the header promises, or a checksum is wrong.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self._num_bytes = math.prod(header.geometry.size) * header.dtype.itemsize
        self._filled = 0
        with ExitStack() as files:
            ahead = take_unpacked(path)  # a whole file's, so of NIfTI
            if ahead is not None:
                files.callback(ahead.close)
                self._unpacked: Any = ahead
            else:
                file = files.enter_context(path.open("rb"))
                file.seek(header.file_offset)
                self._unpacked = _unpacked(file, header.encoding)
            with stream_errors():
                _skip(self._unpacked, header.skip)
            self._close = files.pop_all().close

    def close(self) -> None:
        """Closes the file."""
        self._close()

    def fill(self, array: NDArray[Any]) -> None:
        """Puts the next voxels into an array in C order, which is released as it is filled."""
        target = array.reshape(-1).view(np.uint8)
        for start in range(0, len(target), _CHUNK_BYTES):
            part = target[start : start + _CHUNK_BYTES]
            filled = 0
            while filled < len(part):
                with stream_errors():
                    count = self._unpacked.readinto(part[filled:].data)
                if not count:
                    have = self._filled + filled
                    raise ImageError(f"truncated: {have} of {self._num_bytes} bytes of voxels; {_DAMAGED}")
                filled += count
            self._filled += filled
            release(part)

    def end(self) -> None:
        """Looks at what follows the last voxel: nothing but a checksum that is right."""
        with stream_errors():
            if self._unpacked.readinto(bytearray(1)):
                raise ImageError(f"more data than the {self._num_bytes} bytes its header promises; {_DAMAGED}")


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


def in_file_order(volume: Volume | LabelStream) -> Iterator[memoryview]:
    """The little-endian bytes of its voxels with x fastest, slice by slice; Fortran order is not copied."""
    if isinstance(volume, LabelStream):
        planes = 0
        for piece in volume.pieces:
            if piece.dtype != np.uint8 or piece.shape[1:] != volume.geometry.size[1::-1]:
                raise ValueError(f"planes of {piece.dtype} {piece.shape} do not fit a grid of {volume.geometry.size}")
            planes += len(piece)
            yield from (np.ascontiguousarray(plane).reshape(-1).data for plane in piece)
        if planes != volume.geometry.size[2]:
            raise ValueError(f"a label map of {planes} planes does not fit its grid of {volume.geometry.size}")
        return
    array, little = volume.array, volume.dtype.newbyteorder("<")
    for z in range(array.shape[2]):
        plane = array[:, :, z]
        yield np.ascontiguousarray(plane.T, dtype=little).reshape(-1).view(np.uint8).data
        release(plane)


def _skip(stream: Any, num_bytes: int) -> None:
    """Passes over the next bytes; fewer, if the stream ends."""
    if isinstance(stream, BufferedReader):
        stream.seek(num_bytes, os.SEEK_CUR)
        return
    chunk = memoryview(bytearray(min(num_bytes, _CHUNK_BYTES)))
    while num_bytes:
        count = stream.readinto(chunk[:num_bytes])
        if not count:
            return
        num_bytes -= count


def _unpacked(file: BufferedReader, encoding: str) -> Any:
    """A stream of the unpacked bytes from here to the end of the file."""
    if encoding == "zlib":
        return _Inflating(file)
    return igzip.IGzipFile(fileobj=file, mode="rb") if encoding == "gzip" else file


class _Inflating:
    """The bytes that a zlib stream holds; nothing may follow it in the file."""

    def __init__(self, file: BufferedReader) -> None:
        self._file, self._stream = file, isal_zlib.decompressobj()

    def readinto(self, target: memoryview | bytearray) -> int:
        """How many bytes were put into `target`, 0 at the end."""
        while not self._stream.eof:
            packed = self._stream.unconsumed_tail or self._file.read(_CHUNK_BYTES)
            chunk = self._stream.decompress(packed, len(target))
            if chunk:
                target[: len(chunk)] = chunk
                return len(chunk)
            if not packed:
                raise EOFError
        if self._stream.unused_data or self._file.read(1):
            raise ImageError(f"something follows the compressed voxels; {_DAMAGED}")
        return 0
