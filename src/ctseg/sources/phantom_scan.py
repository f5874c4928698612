"""The scanner of made CT: samples an anatomy on a voxel grid, with blur and noise.

Work goes slab by slab in the order `[z, y, x]` of the grid turned to RAS, x fastest, so that memory stays small and
shapes that do not change along z cost one slice. `Volume` arrays leave this module as `[x, y, z]`, as everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctseg.sources.phantom_plan import ScanPlan
from ctseg.sources.phantom_shapes import FloatArray, rotation
from ctseg.sources.phantom_tissue import AIR_HU, Structure
from ctseg.volume import Geometry, Volume, to_ras

_SLAB_VOXELS = 1_000_000
_BLUR_VOXELS = 1.6
"""Width of an edge in the slice plane."""
_TEXTURE_MM = 4.5
"""Size of the lumps in tissue, in an adult."""
_MIN_HU, _MAX_HU = -1024, 3071


def scan(structures: list[Structure], plan: ScanPlan, rng: np.random.Generator) -> tuple[Volume, Volume]:
    """The CT (int16, Hounsfield units) and the labels (uint8) of an anatomy, both on the plan's grid.

    A voxel's label is that of the structure at its centre; its HU is blurred over its footprint, then noise is added.
    """
    image = Volume(np.empty(plan.geometry.size, np.int16, order="F"), plan.geometry)
    organs = Volume(np.empty(plan.geometry.size, np.uint8, order="F"), plan.geometry)
    image_ras, organs_ras = to_ras(image), to_ras(organs)
    columns, rows, slices = image_ras.geometry.size
    frames = {turned: _Frame(image_ras.geometry, plan, turned) for turned in (False, True)}
    noise = _Noise(rng, image_ras.geometry, plan)
    step = max(4, _SLAB_VOXELS // (columns * rows))
    for start in range(0, slices, step):
        slab = np.full((min(step, slices - start), rows, columns), AIR_HU, np.float32)
        values = np.zeros(slab.shape, np.uint8)
        for structure in structures:
            _paint(structure, frames[not structure.is_table], start, slab, values)
        noise.add_to(slab, start)
        np.rint(np.clip(slab, _MIN_HU, _MAX_HU, out=slab), out=slab)
        image_ras.array[:, :, start : start + step] = slab.transpose(2, 1, 0)
        organs_ras.array[:, :, start : start + step] = values.transpose(2, 1, 0)
    return image, organs


class _Frame:
    """Anatomy coordinates of a grid's voxels.

    Attributes:
        edge_mm: Width of an edge within a slice, in anatomy millimetres.
        slice_mm: Slice thickness, in anatomy millimetres.
    """

    def __init__(self, grid: Geometry, plan: ScanPlan, turned: bool) -> None:
        to_anatomy = np.eye(4)
        turn = rotation((0.0, 0.0, -plan.turn_degrees)) if turned else np.eye(3)
        to_anatomy[:3, :3] = turn / np.asarray(plan.stretch)[:, None]
        to_anatomy[:3, 3] = -to_anatomy[:3, :3] @ plan.center_mm
        self._from_index = to_anatomy @ grid.affine
        self._to_index: NDArray[np.float64] = np.linalg.inv(self._from_index).astype(np.float64)
        self.edge_mm = _BLUR_VOXELS * grid.spacing_mm[0] / plan.stretch[0]
        self.slice_mm = grid.spacing_mm[2] / plan.stretch[2]

    def index_box(self, structure: Structure, size: tuple[int, int, int], start: int) -> list[slice]:
        """Slices in x, y, z of a slab that hold the structure with its rim and blur; empty where it is elsewhere."""
        margin = max(-structure.layers[0].depth_mm, 0.0) + self.edge_mm + self.slice_mm
        ends = [(0, size[0] - 1), (0, size[1] - 1), (start, start + size[2] - 1)]
        slab = _moved(self._from_index, _corners(ends))
        low = np.maximum(np.asarray(structure.shape.low_mm) - margin, slab.min(axis=1))
        high = np.minimum(np.asarray(structure.shape.high_mm) + margin, slab.max(axis=1))
        if (low > high).any():
            return [slice(0, 0)] * 3
        index = _moved(self._to_index, _corners(list(zip(low, high, strict=True))))
        index[2] -= start
        first, last = np.floor(index.min(axis=1)), np.ceil(index.max(axis=1)) + 1
        return [slice(int(np.clip(a, 0, n)), int(np.clip(b, 0, n))) for a, b, n in zip(first, last, size, strict=True)]

    def coordinates(self, box: list[slice], start: int) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Anatomy x, y, z as `[z, y, x]` arrays of the box and one more slice, as small as they can be."""
        (x0, x1), (y0, y1), (z0, z1) = ((s.start, s.stop) for s in box)
        k = np.arange(start + z0, start + z1 + 1)[:, None, None]
        index = (np.arange(x0, x1), np.arange(y0, y1)[:, None], k)
        x, y, z = (self._axis(row, index) for row in self._from_index[:3])
        return x, y, z

    @staticmethod
    def _axis(row: NDArray[np.float64], index: tuple[NDArray[np.int64], ...]) -> FloatArray:
        total = np.full((1, 1, 1), row[3])
        for factor, along in zip(row[:3], index, strict=True):
            if abs(factor) > 1e-9:
                total = total + factor * along
        return total.astype(np.float32)


def _corners(ends: Sequence[tuple[Any, Any]]) -> NDArray[np.float64]:
    """The eight corners of a box, one a column."""
    return np.array(np.meshgrid(*ends, indexing="ij"), dtype=np.float64).reshape(3, -1)


def _moved(affine: NDArray[np.float64], points: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Points, one a column, through a 4x4 affine."""
    moved: NDArray[np.float64] = affine[:3, :3] @ points + affine[:3, 3:]
    return moved


def _paint(structure: Structure, frame: _Frame, start: int, slab: FloatArray, values: NDArray[np.uint8]) -> None:
    """Lays a structure's layers over a slab whose first slice is `start`.

    An edge is as wide as the blur in the slice and the thickness of the slice see it: the distance changes by a full
    slice across a surface that faces along z, by nothing across one that runs along z.
    """
    slices, rows, columns = slab.shape
    box = frame.index_box(structure, (columns, rows, slices), start)
    if any(s.start >= s.stop for s in box):
        return
    inside = (box[2], box[1], box[0])
    distance = structure.shape.distance(*frame.coordinates(box, start))
    width: FloatArray | float = frame.edge_mm
    if distance.shape[0] > 1:
        change = np.minimum(np.abs(distance[1:] - distance[:-1]), frame.slice_mm)
        distance = distance[:-1]
        width = np.sqrt(change * change + np.float32(frame.edge_mm**2))
    for layer in structure.layers:
        share = np.clip(0.5 - (distance + np.float32(layer.depth_mm)) / width, 0.0, 1.0)
        slab[inside] += (np.float32(layer.hu) - slab[inside]) * share
        if layer.value is not None:
            np.copyto(values[inside], np.uint8(layer.value), where=distance < -layer.depth_mm)


class _Noise:
    """Quantum noise, correlated between neighbours, and the lumps of real tissue; one slab after another."""

    def __init__(self, rng: np.random.Generator, grid: Geometry, plan: ScanPlan) -> None:
        self._rng = rng
        columns, rows = grid.size[:2]
        self._cells = [_TEXTURE_MM * plan.stretch[0] / spacing for spacing in grid.spacing_mm]
        shape = [int(n / cell) + 3 for n, cell in zip(reversed(grid.size), reversed(self._cells), strict=True)]
        self._lumps = rng.standard_normal(shape, dtype=np.float32)
        self._last = rng.standard_normal((1, rows + 1, columns + 1), dtype=np.float32)
        j, i = np.linspace(-1, 1, rows)[:, None], np.linspace(-1, 1, columns)
        self._sigma = (plan.noise_hu * (0.8 + 0.5 * np.exp(-2.5 * (i * i + j * j)))).astype(np.float32)

    def add_to(self, slab: FloatArray, start: int) -> None:
        """Adds both to the next slab, which starts at slice `start`."""
        slices, rows, columns = slab.shape
        lumps = self._lumps
        for axis, (first, count) in enumerate(((start, slices), (0, rows), (0, columns))):
            lumps = _stretched(lumps, axis, np.arange(first, first + count) / self._cells[2 - axis])
        in_lung = (slab > -930) & (slab < -600)
        slab += np.where(slab > -300, np.float32(5.0), np.float32(0.0)) * lumps
        slab += np.where(in_lung, np.float32(260.0), np.float32(0.0)) * np.clip(lumps - 0.9, 0.0, 1.5)
        white = self._rng.standard_normal((slices, rows + 1, columns + 1), dtype=np.float32)
        white = np.concatenate([self._last, white])
        self._last = white[-1:]
        white = 0.94 * white[1:] + 0.34 * white[:-1]
        white = white[:, 1:] + white[:, :-1]
        slab += (white[:, :, 1:] + white[:, :, :-1]) * (self._sigma / 2)


def _stretched(lattice: FloatArray, axis: int, positions: NDArray[np.float64]) -> FloatArray:
    """The lattice read at fractional positions along one axis, linearly interpolated."""
    below = positions.astype(np.intp)
    shape = [1, 1, 1]
    shape[axis] = -1
    share = (positions - below).astype(np.float32).reshape(shape)
    return lattice.take(below, axis) * (1 - share) + lattice.take(below + 1, axis) * share
