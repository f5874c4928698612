"""The beginning of a packed file, unpacked in a thread while Python imports what is to look at it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from isal import igzip

MAX_BYTES = 32 * 2**20
"""So many are kept: a chest of 60 slices. The rest is unpacked as it is asked for."""
_CHUNK_BYTES = 2**20

_begun: dict[Path, UnpackedAhead] = {}


class UnpackedAhead:
    """The unpacked bytes of a gzip file from its first one on.

    Raises:
        OSError: if it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._file = igzip.open(path, "rb")
        self._chunks: list[memoryview] = []
        self._error: Exception | None = None
        self._has_enough = False
        self._thread = threading.Thread(target=self._run, name="ctseg-unpack")
        self._thread.start()

    def readinto(self, target: memoryview | bytearray) -> int:
        """How many of the next bytes were put into `target`, 0 at the end; raises what igzip raised on the way."""
        self._stop()
        if self._chunks:
            part = self._chunks[0][: len(target)]
            target[: len(part)] = part
            self._chunks[0] = self._chunks[0][len(part) :]
            if not self._chunks[0]:
                del self._chunks[0]
            return len(part)
        if self._error is not None:
            raise self._error
        count: int = self._file.readinto(target)
        return count

    def close(self) -> None:
        """Closes the file; what was unpacked goes."""
        self._stop()
        self._chunks.clear()
        self._file.close()

    def _run(self) -> None:
        num_bytes = 0
        try:
            while num_bytes < MAX_BYTES and not self._has_enough:
                chunk = self._file.read(_CHUNK_BYTES)
                if not chunk:
                    return
                self._chunks.append(memoryview(chunk))
                num_bytes += len(chunk)
        except Exception as error:  # igzip's own among them: whoever reads that far is told
            self._error = error

    def _stop(self) -> None:
        self._has_enough = True
        self._thread.join()


@contextmanager
def unpacking_ahead(path: Path | None) -> Iterator[None]:
    """Has the beginning of a gzip file ready for whoever calls `take_unpacked`; at the end it goes, if nobody did."""
    if path is None:
        yield
        return
    with suppress(OSError):  # whoever opens it again tells why
        if path.is_file():
            _begun[path] = UnpackedAhead(path)
    try:
        yield
    finally:
        left = take_unpacked(path)
        if left is not None:
            left.close()


def take_unpacked(path: Path) -> UnpackedAhead | None:
    """What was begun of a file, if it was; the caller closes it."""
    return _begun.pop(path, None)
