"""A CT that is prepared while it is read: its voxels are never in memory all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctseg.errors import ImageError
from ctseg.io import VoxelStream
from ctseg.io.images import can_stream, check_values, checked_header, read_errors
from ctseg.volume import Geometry


class CTStream:
    """The planes of a CT across the file's slowest axis, each unpacked once, in Hounsfield units.

    It holds only the planes that were asked for last. Whether the file is whole and a CT shows at its end: call
    `finish` before anything that was made of it is used.

    Attributes:
        geometry: The CT's grid.
    """

    def __init__(self, path: Path) -> None:
        """Reads the header.

        Raises:
            ImageError: as `read_image`, for what the header shows; or if `can_stream` says no.
        """
        with read_errors(path):
            self._header = checked_header(path)
        if not can_stream(self._header):
            raise ImageError(f"'{path}' must be read as a whole; its header shifts wide integers")
        self.geometry: Geometry = self._header.geometry
        self._path = path
        self._voxels: VoxelStream | None = None
        self._first, self._held = 0, self._empty(0)
        self._lowest, self._highest, self._bad = np.inf, -np.inf, 0

    def planes(self, first: int, stop: int) -> NDArray[Any]:
        """Planes `first` to `stop` - 1 as `[k, j, i]`; neither may lie before that of the last call.

        Raises:
            ImageError: if the file is damaged.
        """
        with read_errors(self._path):
            self._skip_to(first)
            held = self._held[first - self._first :]
            planes = self._empty(stop - first)
            planes[: len(held)] = held
            self._fill(planes[len(held) :])
        self._first, self._held = first, planes
        return planes

    def finish(self) -> None:
        """Reads what was not asked for.

        Raises:
            ImageError: if the file cannot be trusted or is not a CT, as `read_image`.
        """
        with read_errors(self._path):
            self._skip_to(self.geometry.size[2])
            self._open().end()
        self.close()
        check_values(self._lowest, self._highest, self._bad, self._path)

    def close(self) -> None:
        """Closes the file, if it is open."""
        if self._voxels is not None:
            self._voxels.close()

    def _open(self) -> VoxelStream:
        self._voxels = self._voxels or VoxelStream(self._path, self._header)
        return self._voxels

    def _empty(self, planes: int) -> NDArray[Any]:
        stored = self._header.dtype
        kept = stored if stored.itemsize <= 4 and not self._is_scaled else np.dtype(np.float32)
        return np.empty((planes, *self.geometry.size[1::-1]), kept)

    @property
    def _is_scaled(self) -> bool:
        return (self._header.slope, self._header.intercept) != (1.0, 0.0)

    def _skip_to(self, plane: int) -> None:
        """Reads, looks at and forgets the planes up to this one that were not read yet."""
        unread = self._first + len(self._held)
        for at in range(unread, plane):
            self._held, self._first = self._empty(1), at
            self._fill(self._held)

    def _fill(self, planes: NDArray[Any]) -> None:
        """Puts the next planes into an array, and takes note of how far their values reach."""
        if not len(planes):
            return
        stored = planes if planes.dtype == self._header.dtype else np.empty(planes.shape, self._header.dtype)
        self._open().fill(stored)
        if stored is not planes:
            planes[...] = stored
        if self._is_scaled:
            planes *= np.float32(self._header.slope)
            planes += np.float32(self._header.intercept)
        self._note_values(planes if self._is_scaled else stored)

    def _note_values(self, values: NDArray[Any]) -> None:
        if values.dtype.kind != "f" and values.dtype.itemsize <= 2 and self._lowest < self._highest:
            return  # whole numbers of 16 bits are finite and small, and it is known that not all are the same
        low, high = values.min(), values.max()
        if not (np.isfinite(low) and np.isfinite(high)):
            self._bad += values.size - int(np.count_nonzero(np.isfinite(values)))
        self._lowest, self._highest = min(self._lowest, low), max(self._highest, high)
