"""Which of the recipe's windows `--fast` runs: first the fewest that cover the CT, then those that may change the mask.

More windows may turn a voxel where the average of the first is close, and where it belongs to an organ: a window that
shows more of that often sees another border. So windows that hold some of an organ run, and those that hold undecided
voxels, until what has been found asks for no more. Those that run are the recipe's own, with equal weights, so a voxel
all of whose windows have run gets exactly the score that it gets without `--fast`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from ctseg.arrays import Array, to_work_on
from ctseg.engine.windows import Blocks, Start, close_and_found

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
    blocks = Blocks([*done, *others], held)
    bounds_XYZ = blocks.covered_by(done) * UNDECIDED_LOGIT
    undecided_SXYZ, found_SXYZ = close_and_found(to_work_on(total_CXYZ), blocks, bounds_XYZ)
    voxels_S = found_SXYZ.sum(axis=(1, 2, 3))
    undecided_WS, found_WS = (blocks.of_windows(others, counts) for counts in (undecided_SXYZ, found_SXYZ))
    beside_W = np.all(found_WS <= HELD * voxels_S, axis=1)
    order = (undecided_WS / (voxels_S + 1)).max(axis=1).argsort(kind="stable")
    order = order[beside_W[order]]
    spared = order[np.all(undecided_WS[order].cumsum(axis=0) <= LEFT_OUT * voxels_S, axis=1)]
    left_out = set(spared.tolist())
    return [start for number, start in enumerate(others) if number not in left_out]
