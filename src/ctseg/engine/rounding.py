"""Where reduced precision may have turned voxels of a mask: those windows are run again in float32.

Rounding turns a voxel only where two classes are close. How many it turns is about how many voxels lie within one logit
of a tie, were they as dense there as they are near it, times how far rounding moves a logit; a window's share in that
is one of as many as cover the voxel. So the windows can be ordered by what running them exactly would save, and what
is left is known before any of them has run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ctseg.arrays import Array, array_namespace, to_work_on
from ctseg.engine.windows import Blocks, Start, close_and_found, leads

NEAR_LOGIT = 0.2
"""Voxels whose logit leads or trails by less are counted: P from 0.45 to 0.55."""
TURNED = 0.001
"""Rounding may turn so many voxels of a structure, as a share of what was found of it: a Dice of 0.9995."""
LEAST_VOXELS = 1000
"""Of a structure with fewer, as many as of one with so many: one voxel."""
MOST_SHARE = 0.25
"""Of all windows. Where more would have to run again, float32 from the start would have been faster."""


class Rounding:
    """How many voxels the rounding of windows has turned, as far as can be told.

    Args:
        total_CXYZ: The sum of the logits of all windows; one channel is the difference of two classes.
        windows: Their first voxels.
        held: What a window holds of the grid.

    Attributes:
        windows: The same, those first whose rounding turns most.
    """

    def __init__(self, total_CXYZ: Array, windows: Sequence[Start], held: Start) -> None:
        blocks = Blocks(windows, held)
        covered_XYZ = blocks.covered_by(windows)
        near_SXYZ, found_SXYZ = close_and_found(to_work_on(total_CXYZ), blocks, covered_XYZ * NEAR_LOGIT)
        self._voxels_S = found_SXYZ.sum(axis=(1, 2, 3))
        self._may_turn_S = TURNED * np.maximum(self._voxels_S, LEAST_VOXELS)
        turned_WS = blocks.of_windows(windows, near_SXYZ / (2 * NEAR_LOGIT * covered_XYZ))  # if it moved all by 1
        order = (turned_WS / self._may_turn_S).max(axis=1).argsort(kind="stable")[::-1]
        self.windows = [windows[number] for number in order]
        self._left_NS = np.cumsum(turned_WS[order[::-1]], axis=0)[::-1]
        """Of the windows from the Nth on."""
        self._squares, self._voxels = 0.0, 0

    def learn(self, rounded_CXYZ: Array, exact_CXYZ: Array) -> None:
        """Is told what rounding does to a window's logits."""
        rounded_SXYZ, exact_SXYZ = leads(rounded_CXYZ), leads(exact_CXYZ)
        xp = array_namespace(rounded_SXYZ)
        moved = (exact_SXYZ - rounded_SXYZ)[xp.abs(rounded_SXYZ) < 2 * NEAR_LOGIT]
        self._squares += float(xp.sum(moved * moved))
        self._voxels += moved.shape[0]

    def needed(self) -> int:
        """How many of `windows`, from the first, have to run exactly for the others to turn no more than they may."""
        fits_N = np.all(self._left_NS * self._error <= self._may_turn_S, axis=1)
        return len(fits_N) if not fits_N.any() else int(fits_N.argmax())

    def describe(self, exact: int) -> str:
        """For people: what is turned once the first `exact` of `windows` have run exactly."""
        left_S = self._left_NS[exact] * self._error
        worst = int((left_S / self._may_turn_S).argmax())
        return (
            f"rounding has turned about {left_S[worst]:.0f} of {self._voxels_S[worst]} voxels of a structure, and too "
            f"many windows had to run again to settle it; --precision float32 has the exact mask"
        )

    @property
    def _error(self) -> float:
        """How far rounding moves the logits that are near: their root mean square."""
        return math.sqrt(self._squares / self._voxels) if self._voxels else 1.0
