"""Which of the recipe's windows `--fast` runs: first the fewest that cover the CT, then those that may change the mask.

Where the averaged logits of the first pass are close, more windows may turn them, and nowhere else: on real CT more
than 98 % of the voxels in which the first pass and all windows disagree are undecided, as defined here. Windows that
hold next to none of these are left out. Those that run are the recipe's own, with equal weights, so a voxel all of
whose windows have run gets exactly the score that it gets without `--fast`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from ctseg.arrays import Array, device_of, to_numpy, to_work_on, zeros
from ctseg.preprocess import slabs_of

Start = tuple[int, int, int]
Box = tuple[slice, slice, slice, slice]
UNDECIDED_LOGIT = 2.0
"""A voxel is undecided for a structure whose logit differs by less from the best other one: P from 0.12 to 0.88."""
LEFT_OUT = 0.01
"""The windows left out hold together at most so many undecided voxels of a structure, as a share of its voxels."""


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
    """Those of `others` that may change the mask, in their order.

    Args:
        total_CXYZ: The sum of the logits of the windows in `done`; one channel is the difference of two classes.
        done: First voxels of windows that cover the grid.
        others: First voxels of the windows that have not run.
        held: What a window holds of the grid.
    """
    if not others:
        return []
    undecided_SXYZ, voxels_S = _undecided(to_work_on(total_CXYZ), done, held)
    counts_WS = np.empty((len(others), len(voxels_S)), dtype=np.int64)
    for number, start in enumerate(others):
        x, y, z = (slice(s, s + n) for s, n in zip(start, held, strict=True))
        counts_WS[number] = _voxels_of_each(undecided_SXYZ[:, x, y, z])
    order = (counts_WS / (voxels_S + 1)).max(axis=1).argsort(kind="stable")
    spared = order[(counts_WS[order].cumsum(axis=0) <= LEFT_OUT * voxels_S).all(axis=1)]
    left_out = set(spared.tolist())
    return [start for number, start in enumerate(others) if number not in left_out]


def average(total_CXYZ: Array, done: Sequence[Start], held: Start) -> None:
    """Divides a sum of logits by the number of windows at each voxel, in place; any windows that cover the grid."""
    for _, slab_CXYZ, counts_XYZ in _slabs(to_work_on(total_CXYZ), done, held):
        slab_CXYZ /= counts_XYZ


def _undecided(total_CXYZ: Array, done: Sequence[Start], held: Start) -> tuple[Array, NDArray[np.int64]]:
    """Where each structure S is undecided, bool, and how many voxels it has so far, on the host."""
    xp = array_namespace(total_CXYZ)
    undecided_SXYZ = xp.zeros_like(total_CXYZ[1:] if len(total_CXYZ) > 1 else total_CXYZ, dtype=xp.bool)
    voxels_S = np.zeros(len(undecided_SXYZ), dtype=np.int64)
    for box, slab_CXYZ, counts_XYZ in _slabs(total_CXYZ, done, held):
        lead_SXYZ = _leads(slab_CXYZ / counts_XYZ)
        undecided_SXYZ[box] = xp.abs(lead_SXYZ) < UNDECIDED_LOGIT
        voxels_S += _voxels_of_each(lead_SXYZ > 0)
    return undecided_SXYZ, voxels_S


def _voxels_of_each(flags_SXYZ: Array) -> NDArray[np.int64]:
    """How many voxels of each structure are flagged, on the host."""
    counts: NDArray[np.int64] = to_numpy(array_namespace(flags_SXYZ).count_nonzero(flags_SXYZ, axis=(1, 2, 3)))
    return counts


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
