"""The one pair `prepare` / `restore`: from a CT to the network's input, and from scores back to the CT's own grid.

Equal to MONAI's Orientation(RAS) -> Spacing(bilinear, border) -> ScaleIntensityRange(clip) and to the inverse of
Spacing and Orientation with linear interpolation followed by argmax, but leaner: linear resampling between two grids
with the same axes is separable, so it runs one axis after another, slab by slab along the slowest axis of memory;
axis flips are folded into the sampling positions; and scores are restored only inside the box that can hold a label.
On the CPU it is NumPy's work, on a GPU torch's (see `ctseg.arrays`).

Shape suffixes: X Y Z the network's RAS grid, IJK the array axes of a file, C channels.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from ctseg.arrays import (
    Array,
    array_namespace,
    as_asked,
    device_of,
    memory_order,
    release_array,
    to_device,
    to_numpy,
    to_work_on,
    zeros,
)
from ctseg.errors import ImageError
from ctseg.scratch import SLAB_VOXELS, new_array, release
from ctseg.specs import Preprocess
from ctseg.volume import Geometry, PlaneStream, Volume, orientation_to_ras, to_ras
from ctseg.workers import free_threads, in_order

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")

MAX_VOXELS = 2**30
"""More on the network's grid is a damaged header, not a CT: a whole body at 1 mm has half of this."""
STREAMED_VOXELS = 2**23
"""About so many voxels of a CT wait between its file and the network's grid, in at most four bytes each."""
MAX_THREADS = 4
"""More would wait for memory, and each works on a slab of its own."""
SPACING_TOLERANCE_MM = 1e-3
"""Spacings this close count as equal, as in MONAI's Spacing."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A network's input and the two grids it lies between.

    Attributes:
        image_XYZ: float32, in 0..1 unless the recipe does not clip. In memory of the CPU z lies fastest, as windows are
            cut along it; on disk and on a GPU it has the source's order.
        geometry: The RAS grid of `image_XYZ`.
        source: The grid of the CT it was made from.
    """

    image_XYZ: Array
    geometry: Geometry
    source: Geometry


Fill = Callable[[Callable[[int, int], None]], None]
"""Fills an image piece by piece, and tells which planes are there, along the axis that is the source's slowest."""


@dataclass(frozen=True, eq=False)
class Taps:
    """Linear sampling along one axis: value n is `a[low[n]] * (1 - weight[n]) + a[high[n]] * weight[n]`."""

    low: Array
    high: Array
    weight: Array

    @classmethod
    def at(cls, positions: NDArray[np.floating], size: int, device: torch.device) -> Taps:
        """Taps for positions in voxels along an axis of `size` voxels; outside, the border value is repeated."""
        clamped = np.clip(positions, 0, size - 1)
        low = np.minimum(np.floor(clamped).astype(np.int64), max(size - 2, 0))
        weight = (clamped - low).astype(np.float32)
        high = np.minimum(low + 1, size - 1)
        return cls(*(to_device(a, device) for a in (low, high, weight)))

    def part(self, start: int, stop: int) -> Taps:
        """The taps of outputs start..stop-1."""
        return Taps(self.low[start:stop], self.high[start:stop], self.weight[start:stop])

    def shifted(self, offset: int) -> Taps:
        """The same taps into an array that starts `offset` voxels later."""
        return Taps(self.low - offset, self.high - offset, self.weight)

    def apply(self, values: Array, axis: int) -> Array:
        """`values` sampled along `axis`, as float32."""
        xp = array_namespace(values)
        low, high = (
            xp.astype(xp.take(values, index, axis=axis), xp.float32, copy=False) for index in (self.low, self.high)
        )
        high -= low
        high *= self.weight.reshape([-1 if n == axis else 1 for n in range(values.ndim)])
        low += high
        return low

    def __len__(self) -> int:
        return len(self.weight)


def network_geometry(source: Geometry, spec: Preprocess) -> Geometry:
    """The RAS grid at `spec.spacing_mm` over `source`, laid out as MONAI's Spacing does it, step by step.

    An axis whose spacing is within SPACING_TOLERANCE_MM of the wanted one keeps its own, and so do slices where the
    recipe says so. The first voxel centres of both grids coincide, the last may be half a voxel apart. Only where the
    axes are not quite at right angles does MONAI align the grids' middles instead, and the float32 header of an oblique
    NIfTI file is enough for that.

    Raises:
        ImageError: if the grid would have more than MAX_VOXELS.
    """
    ras = to_ras(Volume(np.broadcast_to(np.uint8(0), source.size), source)).geometry
    x, y, z = (
        have if abs(have - want) <= SPACING_TOLERANCE_MM else want
        for have, want in zip(ras.spacing_mm, spec.spacing_mm, strict=True)
    )
    if spec.keep_slice_spacing:
        z = ras.spacing_mm[2]
    axes = ras.affine[:3, :3]
    rotation = axes @ np.linalg.inv(np.linalg.cholesky(axes.T @ axes).T)
    affine = Geometry.from_parts(source.size, (x, y, z), (0.0, 0.0, 0.0), rotation).affine
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in ras.size], [1], indexing="ij")).reshape(4, -1)
    corners_on_grid = (np.linalg.solve(affine, ras.affine) @ corners)[:3]
    size = np.round(np.ptp(corners_on_grid, axis=1) + 1.0)
    if size.prod() > MAX_VOXELS:
        raise ImageError(
            f"at the network's spacing a CT must have at most {MAX_VOXELS} voxels, got {_times(size)} "
            f"({_times(source.size)} of {_times(source.spacing_mm)} mm); correct the spacing in its header or crop it"
        )
    if (corners_on_grid - corners_on_grid[:, :1] >= -1e-8).all():
        affine[:3, 3] = ras.affine[:3, 3]
    else:
        affine[:3, 3] = (ras.affine @ [*(n / 2 for n in ras.size), 1.0])[:3] - affine[:3, :3] @ (size / 2)
    return Geometry((int(size[0]), int(size[1]), int(size[2])), affine)


def _times(values: Iterable[float]) -> str:
    return " x ".join(f"{value:.6g}" for value in values)


def prepare(volume: Volume, spec: Preprocess, device: torch.device, scratch: Path | None = None) -> Prepared:
    """The network's input: RAS axes, `spec.spacing_mm`, `spec.hu_window` mapped to 0..1 and clipped there.

    Args:
        volume: CT in Hounsfield units, any axis order.
        spec: Spacing and window.
        device: Where the work is done and the result lies.
        scratch: On the CPU, a folder on whose disk the result is to lie; None: in memory.

    Raises:
        ImageError: if the grid would be too large.
    """
    prepared, fill = preparation(volume, spec, device, scratch)
    fill(lambda *_: None)
    return prepared


def preparation(
    volume: Volume | PlaneStream, spec: Preprocess, device: torch.device, scratch: Path | None
) -> tuple[Prepared, Fill]:
    """As `prepare`, but its image is zeros yet, and what fills it: perhaps while the CT is read.

    That raises ImageError if what is read proves to be damaged or no CT.
    """
    grid = network_geometry(volume.geometry, spec)
    low, high = spec.hu_window
    axes = memory_order(volume.array) if isinstance(volume, Volume) else [2, 1, 0]
    taps = [_to_network_grid(volume.geometry, grid, axis, device) for axis in axes]
    ras_axes = [orientation_to_ras(volume.geometry)[axis][0] for axis in axes]
    image_XYZ, out = _image_and_source_order([len(t) for t in taps], ras_axes, device, scratch)
    xp = array_namespace(out)

    def fill(on_part: Callable[[int, int], None]) -> None:
        def scale(start: int, slabs: list[Array]) -> None:
            (slab,) = slabs
            slab -= low
            slab /= high - low
            part = out[start : start + len(slab)]
            part[...] = xp.clip(slab, 0.0, 1.0) if spec.clip else slab
            release_array(part)
            on_part(start, start + len(slab))

        if isinstance(volume, Volume):
            source = volume.array.transpose(axes)
            deque(_resampled(1, source.shape, lambda first, stop: [source[first:stop]], taps, device, scale), maxlen=0)
        else:
            shape, planes = volume.geometry.size[::-1], volume.planes
            parts = _resampled(1, shape, lambda *reach: [planes(*reach)], taps, device, scale, as_read=True)
            deque(parts, maxlen=0)
            volume.finish()

    return Prepared(as_asked(image_XYZ, device), grid, volume.geometry), fill


def prepare_labels(labels: Volume, spec: Preprocess) -> NDArray[np.uint8]:
    """A label map on the network's grid `[x, y, z]`, nearest neighbour.

    Voxels halfway between two go to the even one; in MONAI's Spacing rounding errors decide.
    """
    grid = network_geometry(labels.geometry, spec)
    order = orientation_to_ras(labels.geometry)
    index = []
    for axis in range(3):
        positions = _positions_in_source(labels.geometry, grid, axis)
        index.append(np.clip(np.round(positions), 0, labels.geometry.size[axis] - 1).astype(np.int64))
    sampled = labels.array[np.ix_(*index)]
    return np.ascontiguousarray(sampled.transpose(np.argsort([ras_axis for ras_axis, _ in order])))


def restore(scores_CXYZ: Array, prepared: Prepared, scratch: Path | None = None) -> NDArray[np.uint8]:
    """Labels on the CT's own grid, `[i, j, k]` in Fortran order: linear interpolation of the scores, then a decision.

    Args:
        scores_CXYZ: One channel: label 1 where the interpolated value is above 0 (pass the probability of the
            foreground minus that of the background). Several: the class with the largest interpolated value, the
            first of equals, as argmax.
        prepared: What `prepare` returned for this CT; its image is not needed any more.
        scratch: Folder on whose disk the labels are to lie; None: in memory.

    Interpolated values are weighted means of at most eight neighbours, so a voxel can only get a label if one of its
    neighbours on the network's grid has it: work is confined to that box, and the result is exactly that of
    resampling the whole volume.
    """
    labels: NDArray[np.uint8] = new_array(prepared.source.size[::-1], np.uint8, scratch).T
    found = _labelled(scores_CXYZ, prepared)
    if found is not None:
        target, done = labels.T[found.box], 0
        for part in found.parts:
            room = target[done : done + len(part)]
            room[...] = part
            release(room)
            done += len(part)
    return labels


def restored_planes(scores_CXYZ: Array, prepared: Prepared) -> Generator[NDArray[np.uint8], None, None]:
    """What `restore` gives, piece by piece and never as a whole: `[k, j, i]` of the next planes along k, to the end."""
    columns, rows, planes = prepared.source.size
    depth = max(1, SLAB_VOXELS // (rows * columns))
    found = _labelled(scores_CXYZ, prepared)
    if found is None:
        yield from _unlabelled(planes, depth, rows, columns)
        return
    in_depth, in_rows, in_columns = found.box
    yield from _unlabelled(in_depth.start, depth, rows, columns)
    with closing(found.parts):
        for part in found.parts:  # a narrow box has deep ones
            for start in range(0, len(part), depth):
                labels = part[start : start + depth]
                whole = np.zeros((len(labels), rows, columns), dtype=np.uint8)
                whole[:, in_rows, in_columns] = labels
                yield whole
    yield from _unlabelled(planes - in_depth.stop, depth, rows, columns)


def _unlabelled(planes: int, depth: int, rows: int, columns: int) -> Iterator[NDArray[np.uint8]]:
    empty = np.zeros((min(planes, depth), rows, columns), dtype=np.uint8)
    return (empty[: planes - start] for start in range(0, planes, depth))


@dataclass(frozen=True, eq=False)
class _Labelled:
    """The box `[k, j, i]` of a CT that can hold labels, and these, some planes after the others."""

    box: tuple[slice, slice, slice]
    parts: Generator[NDArray[np.uint8], None, None]


def _labelled(scores_CXYZ: Array, prepared: Prepared) -> _Labelled | None:
    """Where labels are; None if there are none."""
    scores_CXYZ, source = to_work_on(scores_CXYZ), prepared.source
    device = device_of(scores_CXYZ)
    box = _label_box(scores_CXYZ)
    if box is None:
        return None
    order = orientation_to_ras(source)
    taps, targets, crops = [], [], [slice(None)] * 3
    for axis in (2, 1, 0):  # slowest axis of a file first
        ras_axis = order[axis][0]
        full = _to_source_grid(source, prepared.geometry, axis, device)
        start, stop = _reach(full, *box[ras_axis])
        if start == stop:
            return None
        part = full.part(start, stop)
        first, last = int(part.low.min()), int(part.high.max())
        crops[ras_axis] = slice(first, last + 1)
        taps.append(part.shifted(first))
        targets.append(slice(start, stop))
    cropped = scores_CXYZ[..., crops[0], crops[1], crops[2]]
    by_memory = array_namespace(cropped).permute_dims(cropped, (0, *(1 + order[axis][0] for axis in (2, 1, 0))))
    if isinstance(by_memory, np.ndarray) and by_memory.strides[1] < max(by_memory.strides[2:]):
        by_memory = np.ascontiguousarray(by_memory)  # slabs of it are read one after another

    def decide(_start: int, slabs: list[Array]) -> NDArray[np.uint8]:
        return to_numpy(slabs[0] > 0 if len(slabs) == 1 else _largest(slabs)).view(np.uint8)

    channels, *shape = by_memory.shape
    parts = _resampled(channels, shape, lambda first, stop: list(by_memory[:, first:stop]), taps, device, decide)
    return _Labelled((targets[0], targets[1], targets[2]), parts)


def _image_and_source_order(
    sizes: list[int], ras_axes: list[int], device: torch.device, scratch: Path | None
) -> tuple[Array, Array]:
    """Zeros `[X, Y, Z]`, and the same array with its axes in the source's order, whose n-th is `ras_axes[n]`."""
    by_ras = tuple(ras_axes.index(n) for n in range(3))
    if device.type == "cpu" and scratch is None:
        image_XYZ = zeros(tuple(sizes[n] for n in by_ras), device)
        return image_XYZ, array_namespace(image_XYZ).permute_dims(image_XYZ, tuple(ras_axes))
    out = zeros(tuple(sizes), device, scratch)
    return array_namespace(out).permute_dims(out, by_ras), out


def slabs_of(values_CXYZ: Array) -> Iterator[tuple[slice, slice, slice, slice]]:
    """Indices of slabs of a grid along its slowest axis of memory; the values of each are released after its turn.

    On a GPU it is the whole grid at once.
    """
    axis = 1 + memory_order(values_CXYZ[0])[0]
    length = values_CXYZ.shape[axis]
    on_cpu = device_of(values_CXYZ).type == "cpu"
    depth = max(1, SLAB_VOXELS * length // math.prod(values_CXYZ.shape)) if on_cpu else length
    for start in range(0, length, depth):
        x, y, z = (slice(start, start + depth) if n == axis else slice(None) for n in (1, 2, 3))
        yield slice(None), x, y, z
        release_array(values_CXYZ[:, x, y, z])


def _largest(slabs: list[Array]) -> Array:
    """Which of the slabs is the largest at each voxel, the first of equals, as uint8."""
    best, xp = slabs[0], array_namespace(slabs[0])
    decided = xp.zeros_like(best, dtype=xp.uint8)
    for value, slab in enumerate(slabs[1:], start=1):
        wins = slab > best
        decided[wins] = value
        best = xp.where(wins, slab, best)
    return decided


def _label_box(scores_CXYZ: Array) -> list[tuple[int, int]] | None:
    """First and last index along X, Y, Z of voxels with a label, or None where there is none."""
    xp = array_namespace(scores_CXYZ)
    labelled = [np.zeros(n, dtype=bool) for n in scores_CXYZ.shape[1:]]
    for box in slabs_of(scores_CXYZ):
        slab = scores_CXYZ[box]
        found_XYZ = slab[0] > 0 if len(slab) == 1 else xp.max(slab[1:], axis=0) > slab[0]
        if not xp.any(found_XYZ):
            continue
        found_XY = xp.any(found_XYZ, axis=2)
        profiles = (xp.any(found_XY, axis=1), xp.any(found_XY, axis=0), xp.any(xp.any(found_XYZ, axis=0), axis=0))
        for places, part, profile in zip(labelled, box[1:], profiles, strict=True):
            places[part] |= to_numpy(profile)
    hits = [places.nonzero()[0] for places in labelled]
    return None if len(hits[0]) == 0 else [(int(hit[0]), int(hit[-1])) for hit in hits]


def _reach(taps: Taps, first: int, last: int) -> tuple[int, int]:
    """The range start..stop of outputs that read any input in first..last; empty where all step over it."""
    touching = to_numpy((taps.high >= first) & (taps.low <= last)).nonzero()[0]
    return (int(touching[0]), int(touching[-1]) + 1) if len(touching) else (0, 0)


def _resampled(
    channels: int,
    shape: Sequence[int],
    planes: Callable[[int, int], list[Array]],
    taps: list[Taps],
    device: torch.device,
    use: Callable[[int, list[Array]], Result],
    *,
    as_read: bool = False,
) -> Generator[Result, None, None]:
    """What `use(start, slabs)` gives for pieces of all channels sampled by `taps`, as float32, cut along axis 0.

    `planes(first, stop)` gives those planes of every channel, of `shape` in all. It is called in this thread, for
    pieces in order or, with `as_read`, so that its ranges ascend and can be read from a file. On the CPU several pieces
    at once are worked on, each in a thread, if together they are not larger than one slab. The parts that were read are
    released.
    """
    depth_in, rows, columns = shape
    to_planes, to_rows, to_columns = sizes = [len(t) for t in taps]
    largest = channels * max(rows * columns, to_rows * to_columns)
    threads = max(1, min(free_threads(MAX_THREADS), SLAB_VOXELS // largest)) if device.type == "cpu" else 1
    within_first = _makes_fewer_values_within_first(shape, sizes)
    between = depth_in * to_rows * columns // to_planes if within_first else rows * columns
    depth = max(1, SLAB_VOXELS // (threads * channels) // max(between, to_rows * to_columns))
    if as_read:  # pieces of what is read wait: one for each thread, one in hand, one held for its last planes
        planes_at_once = STREAMED_VOXELS // ((2 * threads + 2) * rows * columns)
        depth = min(depth, max(1, (planes_at_once - 2) * to_planes // depth_in))

    def pieces() -> Iterator[tuple[int, Taps, list[Array]]]:
        starts = range(0, to_planes, depth)
        for start in reversed(starts) if as_read and int(taps[0].low[0]) > int(taps[0].low[-1]) else starts:
            part = taps[0].part(start, min(start + depth, to_planes))
            first, last = int(part.low.min()), int(part.high.max())
            yield start, part.shifted(first), planes(first, last + 1)

    def work(piece: tuple[int, Taps, list[Array]]) -> Result:
        start, along_planes, stored = piece
        along, slabs = [along_planes, taps[1], taps[2]], []
        with np.errstate(invalid="ignore", over="ignore"):  # infinite voxels, which are refused at the end
            for part in stored:
                values = to_device(part, device) if isinstance(part, np.ndarray) else part
                for axis in (1, 2, 0) if within_first else (0, 1, 2):
                    values = along[axis].apply(values, axis)
                release_array(part)
                slabs.append(values)
            return use(start, slabs)

    return in_order(work, pieces(), threads)


def _makes_fewer_values_within_first(shape: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether sampling the two axes of each plane before the axis across them makes fewer values on the way.

    Pieces are taken to have two planes: each samples another plane that its neighbour samples, too. The answer depends
    on the shapes alone, so that rounding, and with it the mask, is the same on every machine.
    """
    planes, rows, columns = shape
    to_planes, to_rows, to_columns = sizes
    within = to_rows * columns + to_rows * to_columns
    sampled = planes + to_planes / 2
    return sampled * within + to_planes * to_rows * to_columns < to_planes * (rows * columns + within)


def _line(source: Geometry, grid: Geometry, axis: int) -> tuple[float, float]:
    """Where the network grid's voxels lie along the source's array axis: the first, and the step, in source voxels."""
    ras_axis, sign = orientation_to_ras(source)[axis]
    first = float(np.linalg.solve(source.affine, grid.affine[:, 3])[axis])
    return round(first, 9), sign * grid.spacing_mm[ras_axis] / source.spacing_mm[axis]


def _positions_in_source(source: Geometry, grid: Geometry, axis: int) -> NDArray[np.floating]:
    first, step = _line(source, grid, axis)
    return first + np.arange(grid.size[orientation_to_ras(source)[axis][0]]) * step


def _to_network_grid(source: Geometry, grid: Geometry, axis: int, device: torch.device) -> Taps:
    return Taps.at(_positions_in_source(source, grid, axis), source.size[axis], device)


def _to_source_grid(source: Geometry, grid: Geometry, axis: int, device: torch.device) -> Taps:
    first, step = _line(source, grid, axis)
    positions = (np.arange(source.size[axis]) - first) / step
    return Taps.at(positions, grid.size[orientation_to_ras(source)[axis][0]], device)
