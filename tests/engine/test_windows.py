"""Blocks between the faces of windows, and averages, against counting voxel by voxel."""

import numpy as np
import pytest
import torch

from ctseg.engine.windows import Blocks, Start, average, window_starts

GRIDS = [((33, 25, 21), (16, 16, 16), 0.5), ((40, 16, 9), (16, 16, 9), 0.75), ((20, 30, 17), (7, 11, 17), 0.2)]


def voxel_counts(shape: Start, windows: list[Start], held: Start) -> np.ndarray:
    counts_XYZ = np.zeros(shape, np.float32)
    for start in windows:
        counts_XYZ[tuple(slice(s, s + n) for s, n in zip(start, held, strict=True))] += 1
    return counts_XYZ


@pytest.mark.parametrize(("shape", "window", "overlap"), GRIDS)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (2, 1, 0)])
def test_the_average_divides_by_the_windows_at_each_voxel(shape, window, overlap, order) -> None:
    """In whatever order the axes lie in memory, in place."""
    windows = list(window_starts(shape, window, overlap))
    ones = np.zeros((2, *(shape[axis] for axis in order)), np.float32)
    total_CXYZ = ones.transpose(0, *(1 + order.index(axis) for axis in range(3)))
    total_CXYZ += voxel_counts(shape, windows, window)
    total_CXYZ[1] *= 3
    tensor = torch.from_numpy(total_CXYZ)
    average(tensor, windows, window)
    assert (total_CXYZ[0] == 1).all()
    assert (total_CXYZ[1] == 3).all()


@pytest.mark.parametrize(("shape", "window", "overlap"), GRIDS)
def test_blocks_hold_every_voxel_once_and_windows_whole(shape, window, overlap) -> None:
    windows = list(window_starts(shape, window, overlap))
    blocks, some = Blocks(windows, window), windows[::3]
    values_CXYZ = np.random.default_rng(0).integers(0, 9, (2, *shape))
    counts_XYZ = voxel_counts(shape, some, window)
    sums_SXYZ, seen_CXYZ = np.zeros((2, *blocks.shape), np.int64), np.zeros_like(values_CXYZ)
    for number, block_CXYZ in blocks.cut(values_CXYZ):
        sums_SXYZ[(slice(None), *number)] = block_CXYZ.sum(axis=(1, 2, 3))
    for _, block_CXYZ in blocks.cut(seen_CXYZ):
        block_CXYZ += 1
    assert (seen_CXYZ == 1).all()
    covered = blocks.covered_by(some)
    for number, block_CXYZ in blocks.cut(np.stack([counts_XYZ, counts_XYZ])):
        assert (block_CXYZ == covered[number]).all()
    for start, sums in zip(some, blocks.of_windows(some, sums_SXYZ), strict=True):
        x, y, z = (slice(s, s + n) for s, n in zip(start, window, strict=True))
        assert sums.tolist() == values_CXYZ[:, x, y, z].sum(axis=(1, 2, 3)).tolist()
