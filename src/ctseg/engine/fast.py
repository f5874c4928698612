"""Which of the recipe's windows `--fast` runs: first the fewest that cover the CT, then those that may change the mask.

More windows may turn a voxel where the average of the first is close, and where it belongs to an organ: a window that
shows more of that often sees another border. So windows that hold some of an organ run, and those that hold undecided
voxels, until what has been found asks for no more. Those that run are the recipe's own, with equal weights, so a voxel
all of whose windows have run gets exactly the score that it gets without `--fast`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ctseg.arrays import Array, array_namespace, device_of, to_numpy, to_work_on, zeros
from ctseg.preprocess import slabs_of

Start = tuple[int, int, int]
Box = tuple[slice, slice, slice, slice]
UNDECIDED_LOGIT = 1.0
"""A voxel is undecided for a structure whose logit differs by less from the best other one: P from 0.27 to 0.73."""
LEFT_OUT = 0.1
"""The windows left out hold together at most so many undecided voxels of a structure, as a share of its voxels."""
HELD = 0.001
"""A window left out holds at most this share of what has been found of a structure."""


def covering(starts: Sequence[Start], window: Start) -> list[Start]:
    """The fewest of a grid of windows that cover all that the grid covers, in its order."""
    along = [_fewest(sorted({start[axis] for start in starts}), window[axis]) for axis in range(3)]
    chosen = set(itertools.product(*along))
    return [start for start in starts if start in chosen]


def _fewest(starts: list[int], window: int) -> list[int]:
    chosen = starts[:1]
    while chosen[-1] != starts[-1]:
        chosen.append(max(start for start in starts if start <= chosen[-1] + window))
    return chosen


def windows_to_refine(total_CXYZ: Array, done: Sequence[Start], others: Sequence[Start], held: Start) -> list[Start]:
    """Those of `others` that may change the mask, in their order; to be asked again when they have run.

    Args:
        total_CXYZ: The sum of the logits of the windows in `done`; one channel is the difference of two classes.
        done: First voxels of windows that cover the grid.
        others: First voxels of the windows that have not run.
        held: What a window holds of the grid.
    """
    if not others:
        return []
    blocks = _Blocks(others, held)
    undecided_SXYZ, found_SXYZ = _count(to_work_on(total_CXYZ), done, held, blocks)
    voxels_S = found_SXYZ.sum(axis=(1, 2, 3))
    undecided_WS, found_WS = (blocks.of_windows(counts) for counts in (undecided_SXYZ, found_SXYZ))
    beside_W = np.all(found_WS <= HELD * voxels_S, axis=1)
    order = (undecided_WS / (voxels_S + 1)).max(axis=1).argsort(kind="stable")
    order = order[beside_W[order]]
    spared = order[np.all(undecided_WS[order].cumsum(axis=0) <= LEFT_OUT * voxels_S, axis=1)]
    left_out = set(spared.tolist())
    return [start for number, start in enumerate(others) if number not in left_out]


class _Blocks:
    """The grid cut along all faces of windows: voxels are counted in the blocks, and windows are sums of these."""

    def __init__(self, windows: Sequence[Start], held: Start) -> None:
        self.windows, self.held = windows, held
        self.cuts = [sorted({c for start in windows for c in (start[n], start[n] + held[n])}) for n in range(3)]

    def count(self, flags_SXYZ: Array, first: Sequence[int]) -> NDArray[np.int64]:
        """How many voxels of each structure are flagged in each block; the flags begin at voxel `first`."""
        xp = array_namespace(flags_SXYZ)
        flat = to_numpy(xp.nonzero(xp.reshape(flags_SXYZ, (-1,)))[0])
        structures, *places = np.unravel_index(flat, tuple(flags_SXYZ.shape))
        along = zip(self.cuts, first, flags_SXYZ.shape[1:], places, strict=True)
        blocks = [np.searchsorted(cuts, start + np.arange(n), "right")[place] for cuts, start, n, place in along]
        shape = (len(flags_SXYZ), *(len(cuts) + 1 for cuts in self.cuts))
        numbers = np.ravel_multi_index((structures, *blocks), shape)
        return np.bincount(numbers, minlength=math.prod(shape)).reshape(shape)

    def of_windows(self, counts_SXYZ: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sum of each window's blocks, `[W, S]`."""
        sums = []
        for start in self.windows:
            along = zip(self.cuts, start, self.held, strict=True)
            x, y, z = (slice(cuts.index(s) + 1, cuts.index(s + n) + 1) for cuts, s, n in along)
            sums.append(counts_SXYZ[:, x, y, z].sum(axis=(1, 2, 3)))
        return np.stack(sums)


def average(total_CXYZ: Array, done: Sequence[Start], held: Start) -> None:
    """Divides a sum of logits by the number of windows at each voxel, in place; any windows that cover the grid."""
    for _, slab_CXYZ, counts_XYZ in _slabs(to_work_on(total_CXYZ), done, held):
        slab_CXYZ /= counts_XYZ


def _count(
    total_CXYZ: Array, done: Sequence[Start], held: Start, blocks: _Blocks
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many voxels of each structure S are undecided, and found, in each block."""
    xp = array_namespace(total_CXYZ)
    undecided, found = [], []
    for box, slab_CXYZ, counts_XYZ in _slabs(total_CXYZ, done, held):
        lead_SXYZ, first = _leads(slab_CXYZ), [part.start or 0 for part in box[1:]]
        undecided.append(blocks.count(xp.abs(lead_SXYZ) < counts_XYZ * UNDECIDED_LOGIT, first))
        found.append(blocks.count(lead_SXYZ > 0, first))
    return np.sum(undecided, axis=0), np.sum(found, axis=0)


def _leads(logits_CXYZ: Array) -> Array:
    """By how much each structure's logit leads the best other class; negative where it trails."""
    if len(logits_CXYZ) == 1:
        return logits_CXYZ
    xp = array_namespace(logits_CXYZ)
    ordered_CXYZ, structures = xp.sort(logits_CXYZ, axis=0), logits_CXYZ[1:]
    best, second = ordered_CXYZ[-1], ordered_CXYZ[-2]
    return structures - xp.where(structures == best, second, best)


def _slabs(total_CXYZ: Array, done: Sequence[Start], held: Start) -> Iterator[tuple[Box, Array, Array]]:
    """Where a slab of `total_CXYZ` is, a view of it, and the number of windows at its voxels."""
    for box in slabs_of(total_CXYZ):
        slab_CXYZ = total_CXYZ[box]
        counts_XYZ = zeros(tuple(slab_CXYZ.shape[1:]), device_of(total_CXYZ))
        firsts = [part.start or 0 for part in box[1:]]
        for start in done:
            along = zip(start, held, firsts, strict=True)
            x, y, z = (slice(max(s - first, 0), max(s + n - first, 0)) for s, n, first in along)
            counts_XYZ[x, y, z] += 1
        yield box, slab_CXYZ, counts_XYZ
