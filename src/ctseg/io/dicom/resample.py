"""Making an even, rectangular grid of slices that drift or are missing, by linear interpolation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

AIR_HU = -1024.0
"""What lies beyond the edge of a shifted slice."""


def shear_margins(drift_pixels: NDArray[np.float64]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Voxels to add in front and behind, along x and y, so that slices shifted by `drift_pixels` `(n, 2)` fit."""
    low = [max(0, math.ceil(-drift)) for drift in drift_pixels.min(axis=0)]
    high = [max(0, math.ceil(drift)) for drift in drift_pixels.max(axis=0)]
    return (low[0], high[0]), (low[1], high[1])


def shear(array: NDArray[Any], drift_pixels: NDArray[np.float64], planes: Sequence[int]) -> NDArray[Any]:
    """`[x, y, z]` with plane planes[n] shifted by drift_pixels[n] within its plane, on a grid grown by `shear_margins`.

    Integers stay integers, rounded. Planes that are not named are left unset.
    """
    (left, right), (front, back) = shear_margins(drift_pixels)
    size = (array.shape[0] + left + right, array.shape[1] + front + back, array.shape[2])
    sheared = np.empty(size, array.dtype, order="F")
    for (x, y), z in zip(drift_pixels, planes, strict=True):
        plane = _shifted(array[:, :, z].astype(np.float32), float(x) + left, size[0])
        plane = _shifted(plane.T, float(y) + front, size[1]).T
        sheared[:, :, z] = _as_type(plane, array.dtype)
    return sheared


def unshear_labels(plane: NDArray[Any], drift_pixels: NDArray[np.float64], size: tuple[int, int]) -> NDArray[Any]:
    """The nearest label `[x, y]` of a sheared plane at each of the `size` pixels of its source image.

    Args:
        plane: Labels on the sheared grid.
        drift_pixels: `(2,)` where pixel (0, 0) of the source lies in `plane`.
        size: Columns, rows of the source.
    """
    x, y = (np.floor(np.arange(n) + drift + 0.5).astype(int) for n, drift in zip(size, drift_pixels, strict=True))
    taken: NDArray[Any] = plane[np.ix_(x.clip(0, plane.shape[0] - 1), y.clip(0, plane.shape[1] - 1))]
    return taken


def fill_between(array: NDArray[Any], planes: Sequence[int]) -> list[int]:
    """Sets every plane that is not among the ascending `planes` to what lies linearly between its neighbours.

    Returns:
        The planes that were set.
    """
    filled = []
    for below, above in itertools.pairwise(planes):
        for z in range(below + 1, above):
            share = (z - below) / (above - below)
            between = (1 - share) * array[:, :, below].astype(np.float64) + share * array[:, :, above]
            array[:, :, z] = _as_type(between, array.dtype)
            filled.append(z)
    return filled


def _shifted(plane: NDArray[Any], shift: float, length: int) -> NDArray[Any]:
    """Rows moved by `shift` (>= 0, not whole) along the first axis into `length` rows, air where none comes to lie."""
    whole = math.floor(shift)
    share = np.float32(shift - whole)
    moved = np.full((length, plane.shape[1]), AIR_HU, np.float32)
    moved[whole : whole + len(plane)] = plane
    if share > 0:
        beyond = np.full_like(moved, AIR_HU)
        beyond[whole + 1 : whole + 1 + len(plane)] = plane
        moved = (1 - share) * moved + share * beyond
    return moved


def _as_type(plane: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    return plane.astype(dtype) if dtype.kind == "f" else np.rint(plane).astype(dtype)
