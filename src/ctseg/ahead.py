"""The beginning of a gzip file, unpacked in a thread while the process still imports what will read it."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from isal import igzip

MAX_BYTES = 32 * 2**20
"""So many are kept, and at most a chunk more: a chest of 60 slices. The rest is unpacked as it is asked for."""
_CHUNK_BYTES = 2**20

_begun: dict[Path, UnpackedAhead] = {}


class UnpackedAhead:
    """The unpacked bytes of a gzip file from its first one on.

    Raises:
        OSError: if it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._version = _version_of(os.fstat(self._file.fileno()))
        self._unpacked = igzip.IGzipFile(fileobj=self._file, mode="rb")
        self._chunks: list[memoryview] = []
        self._error: Exception | None = None
        self._has_enough = False
        self._thread = threading.Thread(target=self._run, name="ctseg-unpack")
        try:
            self._thread.start()
        except RuntimeError:  # there are too many already
            self._file.close()
            raise

    def is_of(self, path: Path) -> bool:
        """Whether this is the file that lies there now, and unchanged."""
        try:
            return _version_of(path.stat()) == self._version
        except OSError:
            return False

    @property
    def num_bytes(self) -> int:
        """How many are kept."""
        return sum(map(len, self._chunks))

    def stop(self) -> None:
        """Unpacks no more ahead."""
        self._has_enough = True
        self._thread.join()

    def readinto(self, target: memoryview | bytearray) -> int:
        """How many of the next bytes were put into `target`, 0 at the end; raises what igzip raised on the way."""
        self.stop()
        if self._chunks:
            part = self._chunks[0][: len(target)]
            target[: len(part)] = part
            self._chunks[0] = self._chunks[0][len(part) :]
            if not self._chunks[0]:
                del self._chunks[0]
            return len(part)
        if self._error is not None:
            raise self._error
        count: int = self._unpacked.readinto(target)
        return count

    def close(self) -> None:
        """Closes the file; what was unpacked goes."""
        self.stop()
        self._chunks.clear()
        self._file.close()

    def _run(self) -> None:
        num_bytes = 0
        try:
            while num_bytes < MAX_BYTES and not self._has_enough:
                chunk = memoryview(mmap.mmap(-1, _CHUNK_BYTES))  # which the system has back as soon as it is gone
                count = self._unpacked.readinto(chunk)
                if not count:
                    return
                self._chunks.append(chunk[:count])
                num_bytes += count
        except Exception as error:  # igzip's own among them: whoever reads that far is told
            self._error = error


def _version_of(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@contextmanager
def unpacking_ahead(path: Path | None) -> Iterator[None]:
    """Has the beginning of a gzip file ready for whoever calls `take_unpacked`; at the end it goes, if nobody did."""
    if path is None:
        yield
        return
    try:
        if path.is_file():
            _begun[path] = UnpackedAhead(path)
    except (OSError, RuntimeError):  # whoever opens it again tells why, or can do without a thread
        pass
    try:
        yield
    finally:
        forget_unpacked()


def take_unpacked(path: Path) -> UnpackedAhead | None:
    """What was begun of a file, if it was and the file is still the same; the caller closes it."""
    found = _begun.pop(path, None)
    if found is not None and not found.is_of(path):
        found.close()
        return None
    return found


def stop_unpacking() -> int:
    """Unpacks no more ahead; how many bytes are kept."""
    for begun in _begun.values():
        begun.stop()
    return sum(begun.num_bytes for begun in _begun.values())


def forget_unpacked() -> None:
    """Closes what was begun and not taken."""
    while _begun:
        _begun.popitem()[1].close()
