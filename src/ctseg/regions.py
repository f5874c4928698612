"""Which part of a CT a network with clicks sees: a window of the recipe's size, shrunk to fit what is larger.

A region is a box on the network's grid. Along each axis it is as large as the window if that holds what is to be seen
(an organ in training, the clicks in use) with a margin on both sides; where it does not, the region is as large as
that and its voxels are resampled to those of the window. So any organ fits, a large one at a coarser spacing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ctseg.volume import Geometry

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Region:
    """A box on a grid: its first voxel, below 0 where the grid is smaller than it, and its size in voxels."""

    start: Triple
    size: Triple


def region_size(low: Triple, high: Triple, window: Triple, margin: int) -> Triple:
    """The size of a region for the box from voxel `low` to `high`; a window of one voxel along an axis stays that."""
    return _triple(
        1 if n == 1 else max(n, last - first + 1 + 2 * margin) for first, last, n in zip(low, high, window, strict=True)
    )


def region_around(low: Triple, high: Triple, shape: Triple, window: Triple, margin: int) -> Region:
    """The region with the box from `low` to `high` in its middle, moved inside a grid of `shape`."""
    size = region_size(low, high, window, margin)
    return Region(inside([(a + b + 1 - n) // 2 for a, b, n in zip(low, high, size, strict=True)], size, shape), size)


def inside(start: Iterable[int], size: Triple, shape: Triple) -> Triple:
    """The start of a region moved inside a grid of `shape`; the grid in its middle where it is smaller."""
    return _triple(
        min(max(first, 0), length - n) if n <= length else -((n - length) // 2)
        for first, n, length in zip(start, size, shape, strict=True)
    )


def point_in_window(point: Triple, region: Region, window: Triple) -> Triple:
    """The window's voxel that a grid's voxel lies in."""
    return _triple(
        min(max((2 * (p - first) + 1) * n // (2 * size), 0), n - 1)
        for p, first, size, n in zip(point, region.start, region.size, window, strict=True)
    )


def window_geometry(grid: Geometry, region: Region, window: Triple, pad: int = 0) -> Geometry:
    """The grid of a window's voxels, with `pad` more on every side."""
    scale = np.array(region.size) / np.array(window)
    affine = grid.affine.copy()
    affine[:3, :3] *= scale
    affine[:3, 3] += grid.affine[:3, :3] @ (np.array(region.start) + 0.5 * scale - 0.5 - pad * scale)
    return Geometry(_triple(n + 2 * pad for n in window), affine)


def _triple(values: Iterable[int]) -> Triple:
    x, y, z = values
    return x, y, z
