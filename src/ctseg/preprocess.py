"""The one pair `prepare` / `restore`: from a CT to the network's input, and from scores back to the CT's own grid.

Equal to MONAI's Orientation(RAS) -> Spacing(bilinear, border) -> ScaleIntensityRange(clip) and to the inverse of
Spacing and Orientation with linear interpolation followed by argmax, but leaner: linear resampling between two grids
with the same axes is separable, so it runs one axis after another, slab by slab along the slowest axis of memory;
axis flips are folded into the sampling positions; and scores are restored only inside the box that can hold a label.

Shape suffixes: X Y Z the network's RAS grid, IJK the array axes of a file, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ctseg.recipe import Preprocess
from ctseg.volume import Geometry, Volume, orientation_to_ras

SLAB_VOXELS = 4_000_000
"""Resampling works on about this many voxels at a time (16 MB of float32)."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A network's input and the two grids it lies between.

    Attributes:
        image_XYZ: float32 in 0..1.
        geometry: The RAS grid of `image_XYZ`.
        source: The grid of the CT it was made from.
    """

    image_XYZ: Tensor
    geometry: Geometry
    source: Geometry


@dataclass(frozen=True, eq=False)
class Taps:
    """Linear sampling along one axis: value n is `a[low[n]] * (1 - weight[n]) + a[high[n]] * weight[n]`."""

    low: Tensor
    high: Tensor
    weight: Tensor

    @classmethod
    def at(cls, positions: NDArray[np.floating], size: int, device: torch.device) -> Taps:
        """Taps for positions in voxels along an axis of `size` voxels; outside, the border value is repeated."""
        clamped = np.clip(positions, 0, size - 1)
        low = np.minimum(np.floor(clamped).astype(np.int64), max(size - 2, 0))
        weight = (clamped - low).astype(np.float32)
        high = np.minimum(low + 1, size - 1)
        return cls(*(torch.from_numpy(a).to(device) for a in (low, high, weight)))

    def part(self, start: int, stop: int) -> Taps:
        """The taps of outputs start..stop-1."""
        return Taps(self.low[start:stop], self.high[start:stop], self.weight[start:stop])

    def shifted(self, offset: int) -> Taps:
        """The same taps into an array that starts `offset` voxels later."""
        return Taps(self.low - offset, self.high - offset, self.weight)

    def apply(self, values: Tensor, axis: int) -> Tensor:
        """`values` sampled along `axis`, as float32."""
        low = values.index_select(axis, self.low).float()
        high = values.index_select(axis, self.high).float()
        shape = [1] * values.ndim
        shape[axis] = -1
        return low.lerp_(high, self.weight.view(shape))

    def __len__(self) -> int:
        return len(self.weight)


def network_geometry(source: Geometry, spacing_mm: tuple[float, float, float]) -> Geometry:
    """The RAS grid at `spacing_mm` over `source`: first voxel centres coincide, the last may overhang by half."""
    order = orientation_to_ras(source)
    directions = np.zeros((3, 3))
    corner = np.zeros(4)
    corner[3] = 1.0
    sizes = [0, 0, 0]
    for axis, (ras_axis, sign) in enumerate(order):
        directions[:, ras_axis] = sign * source.direction[:, axis]
        corner[axis] = 0 if sign > 0 else source.size[axis] - 1
        extent_mm = (source.size[axis] - 1) * source.spacing_mm[axis]
        sizes[ras_axis] = int(np.round(extent_mm / spacing_mm[ras_axis] + 1.0))
    x, y, z = (source.affine @ corner)[:3]
    return Geometry.from_parts((sizes[0], sizes[1], sizes[2]), spacing_mm, (x, y, z), directions)


def prepare(volume: Volume, spec: Preprocess, device: torch.device) -> Prepared:
    """The network's input: RAS axes, `spec.spacing_mm`, `spec.hu_window` mapped to 0..1 and clipped.

    Args:
        volume: CT in Hounsfield units, any axis order.
        spec: Spacing and window.
        device: Where the work is done and the result lies.
    """
    grid = network_geometry(volume.geometry, spec.spacing_mm)
    low, high = spec.hu_window
    axes = _memory_order(volume.array)
    taps = [_to_network_grid(volume.geometry, grid, axis, device) for axis in axes]
    source = _memory_view(volume.array, axes)
    out = torch.empty([len(t) for t in taps], dtype=torch.float32, device=device)
    for start, slab in _resampled_slabs(source, taps, device):
        out[start : start + len(slab)] = slab.sub_(low).div_(high - low).clamp_(0.0, 1.0)
    ras_axes = [orientation_to_ras(volume.geometry)[axis][0] for axis in axes]
    image_XYZ = out.permute([ras_axes.index(n) for n in range(3)]).contiguous()
    return Prepared(image_XYZ, grid, volume.geometry)


def prepare_labels(labels: Volume, spec: Preprocess) -> NDArray[np.uint8]:
    """A label map on the network's grid `[x, y, z]`, nearest neighbour (ties to even, as MONAI's Spacing)."""
    grid = network_geometry(labels.geometry, spec.spacing_mm)
    order = orientation_to_ras(labels.geometry)
    index = []
    for axis in range(3):
        positions = _positions_in_source(labels.geometry, grid, axis)
        index.append(np.clip(np.round(positions), 0, labels.geometry.size[axis] - 1).astype(np.int64))
    sampled = labels.array[np.ix_(*index)]
    return np.ascontiguousarray(sampled.transpose(np.argsort([ras_axis for ras_axis, _ in order])))


def restore(scores_CXYZ: Tensor, prepared: Prepared) -> NDArray[np.uint8]:
    """Labels on the CT's own grid, `[i, j, k]` in Fortran order: linear interpolation of the scores, then a decision.

    Args:
        scores_CXYZ: One channel: label 1 where the interpolated value is above 0 (pass the probability of the
            foreground minus that of the background). Several: the class with the largest interpolated value, the
            first of equals, as argmax.
        prepared: What `prepare` returned for this CT.

    Interpolated values are weighted means of at most eight neighbours, so a voxel can only get a label if one of its
    neighbours on the network's grid has it: work is confined to that box, and the result is exactly that of
    resampling the whole volume.
    """
    source = prepared.source
    labels = np.zeros(source.size, dtype=np.uint8, order="F")
    box = _label_box(scores_CXYZ)
    if box is None:
        return labels
    order = orientation_to_ras(source)
    taps, targets, crops = [], [], [slice(None)] * 3
    for axis in (2, 1, 0):  # slowest axis of a Fortran-ordered array first
        ras_axis = order[axis][0]
        full = _to_source_grid(source, prepared.geometry, axis, scores_CXYZ.device)
        start, stop = _reach(full, *box[ras_axis])
        part = full.part(start, stop)
        first, last = int(part.low.min()), int(part.high.max())
        crops[ras_axis] = slice(first, last + 1)
        taps.append(part.shifted(first))
        targets.append(slice(start, stop))
    cropped = scores_CXYZ[..., crops[0], crops[1], crops[2]]
    by_memory = cropped.permute(0, *[1 + order[axis][0] for axis in (2, 1, 0)]).contiguous()
    target = labels.transpose(2, 1, 0)[tuple(targets)]
    for start, decided in _decided_slabs(by_memory, taps):
        target[start : start + len(decided)] = decided.cpu().numpy()
    return labels


def _decided_slabs(scores: Tensor, taps: list[Taps]) -> Iterator[tuple[int, Tensor]]:
    if len(scores) == 1:
        for start, slab in _resampled_slabs(scores[0], taps, scores.device):
            yield start, (slab > 0).to(torch.uint8)
        return
    for slabs in zip(*(_resampled_slabs(channel, taps, scores.device) for channel in scores), strict=True):
        start, best = slabs[0]
        decided = torch.zeros(best.shape, dtype=torch.uint8, device=scores.device)
        for value, (_, slab) in enumerate(slabs[1:], start=1):
            wins = slab > best
            decided.masked_fill_(wins, value)
            best = torch.where(wins, slab, best)
        yield start, decided


def _label_box(scores_CXYZ: Tensor) -> list[tuple[int, int]] | None:
    """First and last index along X, Y, Z of voxels with a label, or None where there is none."""
    labelled = scores_CXYZ[0] > 0 if len(scores_CXYZ) == 1 else scores_CXYZ.argmax(dim=0) > 0
    box = []
    for axis in range(3):
        others = [a for a in range(3) if a != axis]
        hits = labelled.any(dim=others[1]).any(dim=others[0]).nonzero()
        if len(hits) == 0:
            return None
        box.append((int(hits[0]), int(hits[-1])))
    return box


def _reach(taps: Taps, first: int, last: int) -> tuple[int, int]:
    """The range start..stop of outputs that read any input in first..last."""
    touching = ((taps.high >= first) & (taps.low <= last)).nonzero()
    return int(touching[0]), int(touching[-1]) + 1


def _resampled_slabs(source: Tensor, taps: list[Taps], device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Pieces (start, float32 values) of `source` sampled by `taps`, along axis 0."""
    depth = max(1, SLAB_VOXELS // max(1, source.shape[1] * source.shape[2]))
    for start in range(0, len(taps[0]), depth):
        part = taps[0].part(start, min(start + depth, len(taps[0])))
        first, last = int(part.low.min()), int(part.high.max())
        slab = source[first : last + 1].to(device)
        slab = part.shifted(first).apply(slab, 0)
        yield start, taps[2].apply(taps[1].apply(slab, 1), 2)


def _positions_in_source(source: Geometry, grid: Geometry, axis: int) -> NDArray[np.floating]:
    """Where the network grid's voxels lie along the source's array axis, in source voxels."""
    ras_axis, sign = orientation_to_ras(source)[axis]
    step = grid.spacing_mm[ras_axis] / source.spacing_mm[axis]
    positions = np.arange(grid.size[ras_axis]) * step
    return positions if sign > 0 else (source.size[axis] - 1) - positions


def _to_network_grid(source: Geometry, grid: Geometry, axis: int, device: torch.device) -> Taps:
    return Taps.at(_positions_in_source(source, grid, axis), source.size[axis], device)


def _to_source_grid(source: Geometry, grid: Geometry, axis: int, device: torch.device) -> Taps:
    ras_axis, sign = orientation_to_ras(source)[axis]
    index = np.arange(source.size[axis])
    from_first = index if sign > 0 else (source.size[axis] - 1) - index
    positions = from_first * (source.spacing_mm[axis] / grid.spacing_mm[ras_axis])
    return Taps.at(positions, grid.size[ras_axis], device)


def _memory_order(array: NDArray[Any]) -> list[int]:
    """The array's axes, slowest in memory first."""
    return sorted(range(3), key=lambda axis: -abs(array.strides[axis]))


def _memory_view(array: NDArray[Any], axes: list[int]) -> Tensor:
    """The array as a tensor with axes in memory order; copied only if torch cannot hold its type or strides."""
    view = array.transpose(axes)
    if view.dtype in (np.uint16, np.uint32, np.uint64) or not view.dtype.isnative:
        view = view.astype(np.int32 if view.dtype == np.uint16 else np.float32)
    view = np.ascontiguousarray(view)
    return torch.from_numpy(view if view.flags.writeable else view.copy())
