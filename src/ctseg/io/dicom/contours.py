"""Outlines of a mask and masks of outlines, on one slice. Coordinates are pixels: (x, y), whole at pixel centres.

`outlines` runs midway between the centres of a pixel inside and one outside, so that whoever asks which pixel centres
lie within it gets the very mask back. `fill` asks just that, and shares no code with it: each checks the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ctseg.errors import ImageError

_CHUNK_EDGES = 2**14
"""So many edges of a polygon are worked on at once: each may cross every row."""
MAX_PART_BYTES = 2**27
"""What the pixels of the contours on one slice may take; 4000 contours as large as a CT slice."""


class _PackedPart(NamedTuple):
    """The pixels of one contour: where its part of the mask begins, its size, its bits, and how many are set."""

    low: tuple[int, int]
    shape: tuple[int, ...]
    bits: NDArray[np.uint8]
    num_pixels: int


def outlines(mask: NDArray[np.bool_]) -> list[NDArray[np.float64]]:
    """The closed outlines of a mask `[x, y]`: one `(points, 2)` polygon, first point not repeated, for each region.

    Regions are connected over edges. The outline of a hole is joined to the one around it by a bridge of no width (a
    keyhole), a quarter of a pixel off every pixel centre: filled by the even-odd rule, by the non-zero rule, or as
    one of several polygons that are united, it gives the same mask.
    """
    from contourpy import contour_generator

    columns, rows = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if not len(columns):
        return []
    low = np.array([columns[0], rows[0]])
    box = np.pad(mask[columns[0] : columns[-1] + 1, rows[0] : rows[-1] + 1], 1).astype(np.float64)
    regions: Any = contour_generator(z=box.T, fill_type="OuterOffset").filled(0.5, np.inf)  # its type names no kind
    polygons = []
    for region, cuts in zip(*regions, strict=True):
        rings = [_corners(ring[:-1]) for ring in np.split(region, cuts[1:-1].astype(int))]
        polygons.append(_with_keyholes(rings[0], rings[1:]) + (low - 1))
    return polygons


def fill(polygon: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.bool_]:
    """The mask `[x, y]` of `size` of the pixel centres within a polygon by the even-odd rule.

    A centre on an edge belongs to the polygon on its right or below, so that polygons side by side share no pixel.
    """
    mask = np.zeros(size, dtype=bool)
    low, part = _fill_part(polygon, size)
    mask[_box(low, part)] = part
    return mask


def _fill_part(polygon: NDArray[np.float64], size: tuple[int, int]) -> tuple[tuple[int, int], NDArray[np.bool_]]:
    """The smallest part of the mask that holds all of the polygon's pixels, and where in the mask it begins."""
    low = np.clip(np.floor(polygon.min(axis=0)), 0, size).astype(np.int64)
    high = np.clip(np.ceil(polygon.max(axis=0)) + 1, low, size).astype(np.int64)
    part = _fill_box(polygon - low, *(high - low).tolist())
    columns, rows = (np.flatnonzero(part.any(axis=axis)) for axis in (1, 0))
    if not len(columns):
        return (0, 0), part[:0, :0]
    part = part[columns[0] : columns[-1] + 1, rows[0] : rows[-1] + 1]
    return (int(low[0] + columns[0]), int(low[1] + rows[0])), part


def _box(low: tuple[int, int], part: NDArray[np.bool_]) -> tuple[slice, slice]:
    return slice(low[0], low[0] + part.shape[0]), slice(low[1], low[1] + part.shape[1])


def _fill_box(polygon: NDArray[np.float64], width: int, height: int) -> NDArray[np.bool_]:
    start, end = polygon, np.roll(polygon, -1, axis=0)
    upward = (start[:, 1] > end[:, 1])[:, None]  # an edge crosses a row at one place, whichever way it runs
    start, end = np.where(upward, end, start), np.where(upward, start, end)
    first = np.clip(np.ceil(start[:, 1]), 0, height).astype(np.int64)
    counts = np.clip(np.ceil(end[:, 1]), 0, height).astype(np.int64) - first
    crossings = np.zeros((height, width + 1), dtype=np.int64)
    for begin in range(0, len(start), _CHUNK_EDGES):
        part = slice(begin, begin + _CHUNK_EDGES)
        edges = np.repeat(np.arange(len(start))[part], counts[part])
        rows = np.arange(len(edges)) - np.repeat(np.cumsum(counts[part]) - counts[part], counts[part]) + first[edges]
        run, rise = (end - start)[edges].T
        columns = np.clip(np.ceil(start[edges, 0] + (rows - start[edges, 1]) * run / rise), 0, width).astype(np.int64)
        crossings += np.bincount(rows * (width + 1) + columns, minlength=crossings.size).reshape(crossings.shape)
    inside: NDArray[np.bool_] = (np.cumsum(crossings[:, :width], axis=1) % 2).astype(bool).T
    return inside


def fill_all(polygons: Iterable[NDArray[np.float64]], size: tuple[int, int]) -> NDArray[np.bool_]:
    """The mask of all closed contours of one structure on one slice, as radiotherapy systems mean them.

    From the largest to the smallest: a contour within what is filled so far cuts a hole, any other one is added.
    Contours that cover the same pixels count once, however often they are repeated.

    Raises:
        ImageError: if they are so many and large that no one drew them.
    """
    distinct: dict[object, _PackedPart] = {}
    held_bytes = 0
    for polygon in polygons:
        low, part = _fill_part(polygon, size)
        bits = np.packbits(part)
        key = (low, part.shape, hashlib.sha256(bits.tobytes()).digest())
        if key not in distinct:
            distinct[key] = _PackedPart(low, part.shape, bits, int(np.count_nonzero(part)))
            held_bytes += bits.nbytes
        if held_bytes > MAX_PART_BYTES:
            raise ImageError(f"{len(distinct)} large contours on one slice are more than can be trusted; it is damaged")
    whole = np.zeros(size, dtype=bool)
    for packed in sorted(distinct.values(), key=lambda found: -found.num_pixels):
        part = np.unpackbits(packed.bits, count=packed.shape[0] * packed.shape[1]).reshape(packed.shape).astype(bool)
        box = whole[_box(packed.low, part)]
        box[part] = not box[part].all()
    return whole


def _corners(ring: NDArray[np.float64]) -> NDArray[np.float64]:
    """The ring without the points that lie on the straight line between their neighbours."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    corners: NDArray[np.float64] = ring[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]
    return corners


def _with_keyholes(outer: NDArray[np.float64], holes: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """One ring: from each hole, beginning with the leftmost, a bridge to the left to whatever is met first."""
    for hole in sorted(holes, key=lambda ring: float(ring[:, 0].min())):
        row = float(hole[hole[:, 0].argmin(), 1]) + 0.25  # corners lie on whole and half rows: none is on this one
        edges, columns = _crossings(hole, row)
        begin = int(edges[columns.argmin()])
        bridge = [[0.0, row], [float(columns.min()), row]]
        edges, columns = _crossings(outer, row)
        left = columns < bridge[1][0]
        met = int(edges[left][columns[left].argmax()])
        bridge[0][0] = float(columns[left].max())
        way = np.roll(hole, -begin - 1, axis=0)
        outer = np.concatenate([outer[: met + 1], bridge, way, bridge[::-1], outer[met + 1 :]])
    return outer


def _crossings(ring: NDArray[np.float64], row: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The edges of a ring that cross a row on which no corner lies, by the index of their first point, and where."""
    after = np.roll(ring, -1, axis=0)
    edges = np.flatnonzero((ring[:, 1] < row) != (after[:, 1] < row))
    start, end = ring[edges], after[edges]
    return edges, start[:, 0] + (row - start[:, 1]) * (end[:, 0] - start[:, 0]) / (end[:, 1] - start[:, 1])
