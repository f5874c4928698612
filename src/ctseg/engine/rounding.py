"""Where reduced precision may have moved a mask: those windows are run again in float32.

Rounding turns a voxel only where two classes are close. How many it turns is about how many voxels lie within one logit
of a tie, were they as dense there as they are near it, times how far rounding moves a logit; a window's share in that
is one of as many as cover the voxel. So the windows can be ordered by what running them exactly saves, and once one of
them has shown how far rounding moves the logits, it is known how many have to.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from array_api_compat import device
from numpy.typing import NDArray

from ctseg.arrays import Array, array_namespace, to_numpy, to_work_on
from ctseg.engine.windows import Blocks, Start, box_of, close_and_found, leads
from ctseg.preprocess import slabs_of

NEAR_LOGIT = 0.2
"""Voxels whose averaged logit leads or trails by less are counted: P from 0.45 to 0.55."""
TURNED = 0.001
"""Rounding may turn so many voxels of a structure, as a share of what was found of it: a Dice of 0.9995."""
TURNED_FAST = 0.003
"""With `--fast`: a Dice of 0.9985."""
LEAST_VOXELS = 1000
"""Of a structure with fewer, one voxel at least."""
MOST_SHARE = 0.25
"""Of the windows that ran. Where more would have to run again, float32 from the start would have been faster."""
MOST_SHARE_FAST = 0.6
"""With `--fast`, where all run again in float32 otherwise: one alone costs a window in each precision."""


class Rounding:
    """How many voxels the rounding of windows has turned, as far as can be told.

    Args:
        total_CXYZ: The sum of the logits of all windows; one channel is the difference of two classes.
        windows: Their first voxels.
        held: What a window holds of the grid.
        fast: Whether rounding may turn more.

    Attributes:
        windows: The same in the order in which they are to run again: first those that show what rounding does to each
            structure, then those whose rounding turns most.
        most: How many of them may.
    """

    def __init__(self, total_CXYZ: Array, windows: Sequence[Start], held: Start, *, fast: bool = False) -> None:
        self._total_CXYZ, self._blocks = to_work_on(total_CXYZ), Blocks(windows, held)
        self._bounds_XYZ = self._blocks.covered_by(windows) * NEAR_LOGIT
        near_SXYZ, found_SXYZ = close_and_found(self._total_CXYZ, self._blocks, self._bounds_XYZ)
        self._voxels_S = found_SXYZ.sum(axis=(1, 2, 3))
        turned = TURNED_FAST if fast else TURNED
        self._may_turn_S = np.maximum(turned * self._voxels_S, TURNED * LEAST_VOXELS)
        turned_WS = self._blocks.of_windows(windows, near_SXYZ / (2 * self._bounds_XYZ))  # by an error of 1
        share_WS = turned_WS / self._may_turn_S
        showing = {int(share_WS[:, s].argmax()): None for s in np.flatnonzero(share_WS.sum(axis=0) > 1)}
        order = list(dict.fromkeys([*showing, *share_WS.max(axis=1).argsort(kind="stable")[::-1].tolist()]))
        self.windows = [windows[number] for number in order]
        self.most = max(int(MOST_SHARE_FAST * len(windows)), 1) if fast else int(MOST_SHARE * len(windows))
        self._num_showing = min(len(showing), self.most)
        self._left_NS = np.cumsum(turned_WS[order[::-1]], axis=0)[::-1]
        """Of the windows from the Nth on."""
        self._num_shown = 0
        self._squares_S = np.zeros(len(self._voxels_S))
        self._learned_S = np.zeros(len(self._voxels_S), dtype=np.int64)

    def learn(self, window: Start, rounded_CXYZ: Array, exact_CXYZ: Array) -> None:
        """Is told what rounding does to the logits of a window, before the total is changed for it.

        Those of voxels that are near a tie in the total count, for each structure by itself.
        """
        self._num_shown += 1
        x, y, z = box_of(window, self._blocks.held)
        total_CXYZ, bounds_1XYZ = self._total_CXYZ[:, x, y, z], self._bounds_of(window)
        xp = array_namespace(total_CXYZ)
        for slab in slabs_of(total_CXYZ):
            near_SXYZ = xp.abs(leads(total_CXYZ[slab])) < bounds_1XYZ[slab]
            moved_SXYZ = xp.where(near_SXYZ, leads(exact_CXYZ[slab]) - leads(rounded_CXYZ[slab]), 0.0)
            self._squares_S += to_numpy(xp.sum(moved_SXYZ * moved_SXYZ, axis=(1, 2, 3)))
            self._learned_S += to_numpy(xp.sum(near_SXYZ, axis=(1, 2, 3)))

    def needed(self) -> int:
        """How many of `windows`, from the first, have to run exactly for the others to turn no more than they may.

        As far as is known: at first those that show what rounding does.
        """
        if self._num_shown < self._num_showing:
            return self._num_showing
        fits_N = np.all(self._left_NS * self._errors() <= self._may_turn_S, axis=1)
        return int(fits_N.argmax()) if fits_N.any() else len(fits_N)

    def describe(self, num_exact: int, names: Sequence[str]) -> str:
        """For people: what is turned once the first `num_exact` of `windows` have run exactly; after `learn`."""
        left_S = self._left_NS[num_exact] * self._errors()
        worst = int((left_S / self._may_turn_S).argmax())
        return (
            f"rounding has turned about {left_S[worst]:.0f} of {self._voxels_S[worst]} voxels of {names[worst]} on the "
            f"network's grid, and too many windows would have to run again; --precision float32 does without rounding"
        )

    def _errors(self) -> NDArray[np.float64]:
        """How far rounding moves logits of each structure (root mean square); unseen ones' as far as any other's."""
        error_S = np.sqrt(self._squares_S / np.maximum(self._learned_S, 1))
        return np.where(self._learned_S > 0, error_S, error_S.max())

    def _bounds_of(self, window: Start) -> Array:
        """Below what the total counts as near, at each voxel of a window."""
        x, y, z = along = self._blocks.of(window)
        bounds_XYZ = self._bounds_XYZ[x, y, z]
        for axis, (cuts, blocks) in enumerate(zip(self._blocks.cuts, along, strict=True)):
            bounds_XYZ = np.repeat(bounds_XYZ, np.diff(cuts)[blocks], axis=axis)
        return array_namespace(self._total_CXYZ).asarray(bounds_XYZ[None], device=device(self._total_CXYZ))
