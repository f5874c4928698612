"""The only inference path: prepare -> sliding window -> restore. Every command that makes a mask ends here.

Scores of overlapping windows are averaged as logits with equal weights, as MONAI's SlidingWindowInferer does with
mode "constant". For two classes only the difference of the two logits is kept: one float32 channel on the network's
grid is all that is accumulated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ctseg.engine.model import Model
from ctseg.preprocess import prepare, restore
from ctseg.recipe import Inference
from ctseg.volume import Volume

Start = tuple[int, int, int]
OnWindow = Callable[[int, int], None]
"""Called after each network call with (calls done, calls in all)."""


def predict(model: Model, volume: Volume, on_window: OnWindow | None = None) -> NDArray[np.uint8]:
    """The label map of a CT on its own grid: uint8 `[i, j, k]`, Fortran order.

    Args:
        model: Network and recipe.
        volume: CT in Hounsfield units, any orientation.
        on_window: Told of progress.
    """
    prepared = prepare(volume, model.recipe.preprocess, model.runtime.device)
    logits = window_logits(model, prepared.image_XYZ, model.recipe.inference, on_window)
    return restore(scores_from_logits(logits), prepared)


def scores_from_logits(logits_CXYZ: Tensor) -> Tensor:
    """Scores that `restore` takes, in place: P(foreground) - P(background) for one channel, else the softmax."""
    if len(logits_CXYZ) == 1:
        return logits_CXYZ.mul_(0.5).tanh_()  # sigmoid(d) - sigmoid(-d)
    return torch.softmax(logits_CXYZ, dim=0)


def window_logits(model: Model, image_XYZ: Tensor, inference: Inference, on_window: OnWindow | None = None) -> Tensor:
    """Averaged logits on the whole grid, float32 `[C, X, Y, Z]`; two classes give one channel: their difference."""
    image_XYZ, inside = _pad_to_window(image_XYZ, inference.window_size)
    shape = _shape(image_XYZ)
    starts = list(window_starts(shape, inference.window_size, inference.overlap))
    num_classes = model.recipe.num_classes
    channels = 1 if num_classes == 2 else num_classes
    total_CXYZ = torch.zeros((channels, *shape), device=image_XYZ.device)
    batch = inference.batch_windows if model.runtime.device.type == "cuda" else 1
    for first in range(0, len(starts), batch):
        group = [_box(start, inference.window_size) for start in starts[first : first + batch]]
        logits_BCXYZ = model.forward(torch.stack([image_XYZ[box] for box in group]).unsqueeze(1))
        if num_classes == 2:
            logits_BCXYZ = logits_BCXYZ[:, 1:] - logits_BCXYZ[:, :1]
        for box, logits_CXYZ in zip(group, logits_BCXYZ, strict=True):
            total_CXYZ[..., box[0], box[1], box[2]] += logits_CXYZ
        if on_window is not None:
            on_window(first // batch + 1, -(-len(starts) // batch))
    for axis, counts in enumerate(_counts(starts, shape, inference.window_size)):
        along = [1, 1, 1, 1]
        along[axis + 1] = -1
        total_CXYZ /= torch.from_numpy(counts).to(total_CXYZ).view(along)
    return total_CXYZ[..., inside[0], inside[1], inside[2]]


def window_starts(shape: Start, window: Start, overlap: float) -> Iterator[Start]:
    """First voxels of the windows that cover `shape`, x slowest; the last along an axis is moved back to its end.

    Positions are those of MONAI's `dense_patch_slices`. `shape` must be at least `window` along every axis.
    """
    along = [_starts_along(n, w, overlap) for n, w in zip(shape, window, strict=True)]
    return ((x, y, z) for x in along[0] for y in along[1] for z in along[2])


def _starts_along(length: int, window: int, overlap: float) -> list[int]:
    step = window if length == window else max(int(window * (1 - overlap)), 1)
    number = max(math.ceil((length - window) / step), 0) + 1
    return [min(n * step, length - window) for n in range(number)]


def _counts(starts: list[Start], shape: Start, window: Start) -> list[NDArray[np.float32]]:
    """How many windows cover each position along each axis; a voxel's number of windows is their product."""
    counts = []
    for axis in range(3):
        covered = np.zeros(shape[axis], dtype=np.float32)
        for start in sorted({s[axis] for s in starts}):
            covered[start : start + window[axis]] += 1
        counts.append(covered)
    return counts


def _pad_to_window(image_XYZ: Tensor, window: Start) -> tuple[Tensor, tuple[slice, ...]]:
    """The image padded with zeros (half before, half after) to at least `window`, and where the image lies in it."""
    missing = [max(w - n, 0) for w, n in zip(window, image_XYZ.shape, strict=True)]
    inside = tuple(slice(m // 2, m // 2 + n) for m, n in zip(missing, image_XYZ.shape, strict=True))
    if any(missing):
        pads = [(m // 2, m - m // 2) for m in missing]
        image_XYZ = functional.pad(image_XYZ, [p for pair in reversed(pads) for p in pair])
    return image_XYZ, inside


def _shape(image_XYZ: Tensor) -> Start:
    x, y, z = image_XYZ.shape
    return x, y, z


def _box(start: Start, size: Start) -> tuple[slice, ...]:
    return tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))
