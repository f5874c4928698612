"""Where the windows of a grid lie, and the blocks that their faces cut it into."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from array_api_compat import device
from numpy.typing import NDArray

from ctseg.arrays import Array, array_namespace, memory_order, release_array, to_numpy, to_work_on
from ctseg.preprocess import slabs_of
from ctseg.specs import Inference

Start = tuple[int, int, int]
"""The first voxel of a window."""
Box = tuple[slice, slice, slice]


def num_windows(shape: Start, inference: Inference) -> int:
    """How many windows cover a grid."""
    sizes = zip(shape, inference.window_size, strict=True)
    return math.prod(len(_starts_along(max(n, w), w, inference.overlap)) for n, w in sizes)


def window_starts(shape: Start, window: Start, overlap: float) -> Iterator[Start]:
    """First voxels of the windows that cover `shape`, x slowest; the last along an axis is moved back to its end.

    Positions are those of MONAI's `dense_patch_slices`. `shape` must be at least `window` along every axis.
    """
    along = [_starts_along(n, w, overlap) for n, w in zip(shape, window, strict=True)]
    return ((x, y, z) for x in along[0] for y in along[1] for z in along[2])


def _starts_along(length: int, window: int, overlap: float) -> list[int]:
    step = window if length == window else max(int(window * (1 - overlap)), 1)
    number = max(math.ceil((length - window) / step), 0) + 1
    return [min(n * step, length - window) for n in range(number)]


def box_of(start: Start, held: Start) -> Box:
    """What a window holds of the grid."""
    x, y, z = (slice(first, first + n) for first, n in zip(start, held, strict=True))
    return x, y, z


def average(total_CXYZ: Array, done: Sequence[Start], held: Start) -> None:
    """Divides a sum of logits by the number of windows at each voxel, in place; any windows that cover the grid."""
    values_CXYZ, blocks = to_work_on(total_CXYZ), Blocks(done, held)
    counts_XYZ = blocks.covered_by(done)
    for number, block_CXYZ in blocks.cut(values_CXYZ):
        block_CXYZ /= float(counts_XYZ[number])


class Blocks:
    """A grid cut along all faces of the windows that cover it: each of them is a number of whole blocks."""

    def __init__(self, windows: Sequence[Start], held: Start) -> None:
        self.held = held
        self.cuts = [sorted({c for start in windows for c in (start[n], start[n] + held[n])}) for n in range(3)]
        self.shape = tuple(len(cuts) - 1 for cuts in self.cuts)

    def cut(self, values_CXYZ: Array) -> Iterator[tuple[Start, Array]]:
        """Each block's number along the axes and its values, in the order of memory; released after its turn."""
        slowest_first = memory_order(values_CXYZ[0])
        for numbers in itertools.product(*(range(self.shape[axis]) for axis in slowest_first)):
            x, y, z = (numbers[slowest_first.index(axis)] for axis in range(3))
            to_x, to_y, to_z = (slice(cuts[n], cuts[n + 1]) for cuts, n in zip(self.cuts, (x, y, z), strict=True))
            block_CXYZ = values_CXYZ[:, to_x, to_y, to_z]
            yield (x, y, z), block_CXYZ
            release_array(block_CXYZ)

    def of(self, window: Start) -> Box:
        """The blocks of a window."""
        along = zip(self.cuts, window, self.held, strict=True)
        x, y, z = (slice(cuts.index(start), cuts.index(start + n)) for cuts, start, n in along)
        return x, y, z

    def covered_by(self, windows: Sequence[Start]) -> NDArray[np.int64]:
        """How many of the windows hold each block."""
        counts_XYZ = np.zeros(self.shape, np.int64)
        for window in windows:
            counts_XYZ[self.of(window)] += 1
        return counts_XYZ

    def of_windows(self, windows: Sequence[Start], counts_SXYZ: NDArray[Any]) -> NDArray[Any]:
        """The sum of what is counted in each window's blocks, `[W, S]`."""
        boxes = (self.of(window) for window in windows)
        return np.stack([counts_SXYZ[:, x, y, z].sum(axis=(1, 2, 3)) for x, y, z in boxes])


def close_and_found(
    total_CXYZ: Array, blocks: Blocks, bounds_XYZ: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many voxels of each structure S lead or trail by less than each block's bound, and how many are found there.

    Args:
        total_CXYZ: The sum of the logits of windows; one channel is the difference of two classes.
        blocks: Of these windows.
        bounds_XYZ: For every block.
    """
    xp, structures = array_namespace(total_CXYZ), max(len(total_CXYZ) - 1, 1)
    counts_KSXYZ = xp.zeros((2, structures, *blocks.shape), dtype=xp.int64, device=device(total_CXYZ))
    for (x, y, z), block_CXYZ in blocks.cut(total_CXYZ):
        bound = float(bounds_XYZ[x, y, z])
        for box in slabs_of(block_CXYZ):
            for number, lead_XYZ in enumerate(leads(block_CXYZ[box])):
                counts_KSXYZ[0, number, x, y, z] += xp.count_nonzero(xp.abs(lead_XYZ) < bound)
                counts_KSXYZ[1, number, x, y, z] += xp.count_nonzero(lead_XYZ > 0)
    close_SXYZ, found_SXYZ = to_numpy(counts_KSXYZ)
    return close_SXYZ, found_SXYZ


def leads(logits_CXYZ: Array) -> Array:
    """By how much each structure's logit leads the best other class; negative where it trails."""
    if len(logits_CXYZ) == 1:
        return logits_CXYZ
    xp = array_namespace(logits_CXYZ)
    ordered_CXYZ, structures = xp.sort(logits_CXYZ, axis=0), logits_CXYZ[1:]
    best, second = ordered_CXYZ[-1], ordered_CXYZ[-2]
    return structures - xp.where(structures == best, second, best)
