"""Large arrays, in memory or on disk: what lies on disk is resident only while it is worked on.

An array on disk lies in a file without a name, which is gone with the array or with the process, however that ends.
It is an ordinary array; the kernel fetches its pages when they are touched. `release` gives them back: the values stay
in the file, and the process is smaller again. Whoever walks over a CT or a mask does so in slabs and releases each.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ctseg.files import output_errors

BLOCK_BYTES = 2**20
SLAB_VOXELS = 2**20
"""Slabs have about this many voxels."""
MAPPED_BYTES = 2**20
"""Larger arrays get memory of their own, which the kernel has back as soon as they are gone."""

_FILES: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()
"""The arrays on disk by their address."""


def new_array(shape: tuple[int, ...], dtype: DTypeLike, folder: Path | None = None) -> NDArray[Any]:
    """An array of zeros in C order, on disk if there is a `folder` for it, else in memory.

    Memory does not come from the C library, which would keep it: arrays of other sizes would not fit into what is
    kept, and after several CTs a process would hold far more than it uses.

    Raises:
        OutputError: if the disk has no room for it, now and not when it is written to.
        MemoryError: if there is not enough memory.
    """
    kind = np.dtype(dtype)
    count = math.prod(shape)
    size = count * kind.itemsize
    if folder is None and size < MAPPED_BYTES:
        return np.zeros(shape, kind)
    mapping = _in_memory(size) if folder is None else _on_disk(size, folder)
    array: NDArray[Any] = np.frombuffer(mapping, kind, count)
    if folder is not None:
        _FILES[array.ctypes.data] = mapping
    return array.reshape(shape)


def release(array: NDArray[Any]) -> None:
    """Gives the memory of an array on disk, or of a part of one, back to the kernel; its values stay.

    Nothing happens to an array in memory.
    """
    if not _FILES:
        return
    first = array.ctypes.data
    reach = [(n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)]
    start = first + sum(step for step in reach if step < 0)
    stop = first + sum(step for step in reach if step > 0) + array.itemsize
    for reference in _FILES.valuerefs():
        mapping, address = reference(), reference.key
        if mapping is not None and address <= start < address + len(mapping):
            page = (start - address) // mmap.PAGESIZE * mmap.PAGESIZE
            mapping.madvise(mmap.MADV_DONTNEED, page, stop - address - page)


def in_slabs(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Views of about SLAB_VOXELS each, along the array's slowest axis of memory; each is released after its turn."""
    axis = int(np.argmax(np.abs(array.strides)))
    depth = max(1, SLAB_VOXELS * array.shape[axis] // max(1, array.size))
    for start in range(0, array.shape[axis], depth):
        slab = np.moveaxis(np.moveaxis(array, axis, 0)[start : start + depth], 0, axis)
        yield slab
        release(slab)


def extremes(array: NDArray[Any]) -> tuple[Any, Any]:
    """The smallest and the largest value; NaN if one is NaN."""
    ends = [(slab.min(), slab.max()) for slab in in_slabs(array)]
    return np.min([low for low, _ in ends]), np.max([high for _, high in ends])


def count_values(labels: NDArray[np.uint8], number: int) -> NDArray[np.int64]:
    """How many voxels have each value from 0 on, for `number` values or as many as there are."""
    counts = np.zeros(256, dtype=np.int64)
    for slab in in_slabs(labels):
        if slab.max(initial=0) > 1:
            counts += np.bincount(slab.ravel(order="K"), minlength=256)
        else:  # as in most slabs; what is 0 or 1 is counted far faster
            ones = int(np.count_nonzero(slab.view(np.bool_)))
            counts[0] += slab.size - ones
            counts[1] += ones
    return counts[: max(number, int(counts.nonzero()[0].max(initial=0)) + 1)]


def _in_memory(size: int) -> mmap.mmap:
    try:
        mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"not enough memory for {size} bytes") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux: a page fault for every 2 MB, not for every 4 kB
        with suppress(OSError):  # a kernel built without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


def _on_disk(size: int, folder: Path) -> mmap.mmap:
    with output_errors(folder), tempfile.TemporaryFile(dir=folder) as file:
        _take_room(file.fileno(), size)  # a write to a mapped page that the disk lacks ends the process
        return mmap.mmap(file.fileno(), size)


def _take_room(descriptor: int, size: int) -> None:
    """Makes a new file `size` bytes long, all of which the disk has room for; OSError if it has not."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    zeros = bytes(BLOCK_BYTES)  # macOS
    for start in range(0, size, BLOCK_BYTES):
        os.pwrite(descriptor, zeros[: size - start], start)
