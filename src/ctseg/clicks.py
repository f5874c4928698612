"""Clicks: how a network is told of them, and how a person's are simulated (Sakinis et al. 2019, arXiv:1903.08205).

A click says of one voxel that the wanted structure is there (positive) or is not (negative). The network gets the CT
and two maps, of the positive and of the negative clicks. A simulated click falls into the larger of two errors, what
the mask misses and what it has too much, on a voxel drawn with a probability proportional to exp(d) - 1, where d is
its chessboard distance to the nearest voxel outside the error: in the middle of the error, as a person would click.

All is as in monai.apps.deepgrow, but on the device, and confined to the box of the error. Random numbers come from the
host, two for each click, so the same seed gives the same clicks on every device. A 2D image is a volume of one slice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ctseg.specs import ClicksSpec

Point = tuple[int, int, int]
TRUNCATE_SIGMAS = 4.0
"""The Gaussian around a click ends here, as in MONAI's GaussianFilter."""


@dataclass(frozen=True)
class Click:
    """A voxel `(x, y, z)` of some grid, and whether the structure is there."""

    point: Point
    positive: bool = True


def network_input(image_B1XYZ: Tensor, clicks: Sequence[Sequence[Click]], sigma_voxels: float) -> Tensor:
    """The CT and its maps of positive and of negative clicks, float32 `[B, 3, X, Y, Z]`.

    A map is 1 at every click, smoothed by a Gaussian, then scaled to 0..1; clicks on one voxel count once, and a map
    without clicks is 0.

    Args:
        image_B1XYZ: CT patches.
        clicks: Those of each image.
        sigma_voxels: Of the Gaussian.
    """
    batch, _, *size = image_B1XYZ.shape
    result = image_B1XYZ.new_empty((batch, 3, *size))
    result[:, 0] = image_B1XYZ[:, 0]
    result[:, 1:] = 0
    for maps_CXYZ, own in zip(result, clicks, strict=True):
        for channel, positive in ((1, True), (2, False)):
            _add_bells(maps_CXYZ[channel], sorted({c.point for c in own if c.positive is positive}), sigma_voxels)
    return result


def _add_bells(map_XYZ: Tensor, points: list[Point], sigma_voxels: float) -> None:
    """Adds a Gaussian at each point to an empty map and scales the map; all within the box of the Gaussians."""
    if not points:
        return
    reach = int(TRUNCATE_SIGMAS * sigma_voxels + 0.5)
    bell = _bell(torch.arange(-reach, reach + 1), sigma_voxels).to(map_XYZ)
    for point in points:
        box, parts = [], []
        for centre, length in zip(point, map_XYZ.shape, strict=True):
            low, high = max(centre - reach, 0), min(centre + reach + 1, length)
            box.append(slice(low, high))
            parts.append(bell[low - centre + reach : high - centre + reach])
        map_XYZ[tuple(box)] += parts[0][:, None, None] * parts[1][:, None] * parts[2]
    ends = [(min(p[axis] for p in points) - reach, max(p[axis] for p in points) + reach + 1) for axis in range(3)]
    changed = map_XYZ[tuple(slice(max(low, 0), high) for low, high in ends)]
    low_value, high_value = changed.aminmax()
    if changed.shape == map_XYZ.shape:  # else the map's lowest value is 0, beside the box
        changed.sub_(low_value)
        high_value = high_value - low_value
    changed.div_(high_value)


def _bell(distances: Tensor, sigma_voxels: float) -> Tensor:
    """The share of a Gaussian that lies in the voxel at each distance."""
    scale = 1 / (2**0.5 * sigma_voxels)
    return (torch.erf((distances + 0.5) * scale) - torch.erf((distances - 0.5) * scale)) / 2


def chessboard_distance(region_XYZ: Tensor) -> Tensor:
    """For each voxel of a region its distance to the nearest voxel outside, int16 `[X, Y, Z]`; 0 outside.

    The chessboard metric: diagonal steps count 1. The border of the array is no outside; where the region fills the
    array there is none at all, and every distance is -1, as in scipy.ndimage.distance_transform_cdt.
    """
    left = region_XYZ.to(torch.uint8)
    if left.all():
        return left.to(torch.int16).neg_()
    distance = left.to(torch.uint8 if max(left.shape) <= 255 else torch.int16, copy=True)  # a byte is far faster
    while left.any():
        left = _eroded(left)
        distance += left
    return distance.to(torch.int16)


def _eroded(region_XYZ: Tensor) -> Tensor:
    """Without the voxels that have a neighbour outside, of 26; one axis after another."""
    for axis, length in enumerate(region_XYZ.shape):
        eroded = region_XYZ.clone()
        eroded.narrow(axis, 1, length - 1).bitwise_and_(region_XYZ.narrow(axis, 0, length - 1))
        eroded.narrow(axis, 0, length - 1).bitwise_and_(region_XYZ.narrow(axis, 1, length - 1))
        region_XYZ = eroded
    return region_XYZ


def draw_voxel(region_XYZ: Tensor, rng: np.random.Generator) -> Point | None:
    """A voxel of the region, drawn by the law at the top of this module; None where the region is empty."""
    box = _box(region_XYZ)
    if box is None:
        return None
    distance = chessboard_distance(region_XYZ[box])
    inside = distance != 0
    counts = torch.bincount(distance[inside].int().abs()).double().cpu().numpy()
    chosen = _level(counts, rng.random())
    voxels_N3 = (distance.abs() == chosen).nonzero()
    voxel = voxels_N3[min(int(rng.random() * len(voxels_N3)), len(voxels_N3) - 1)].tolist()
    x, y, z = (n + part.start for n, part in zip(voxel, box, strict=True))
    return x, y, z


def _level(counts: np.ndarray, uniform: float) -> int:
    """The distance at which the drawn voxel lies, where `counts[d]` voxels lie at distance d, d from 1."""
    levels = np.arange(1, len(counts))
    with np.errstate(divide="ignore"):
        logs = np.log(counts[1:]) + levels + np.log1p(-np.exp(-levels.astype(np.float64)))  # of counts * (exp(d) - 1)
    shares = np.cumsum(np.exp(logs - logs.max()))
    return int(levels[np.searchsorted(shares, uniform * shares[-1], side="right").clip(max=len(levels) - 1)])


def _box(region_XYZ: Tensor) -> tuple[slice, slice, slice] | None:
    """The region's box and one voxel around it, so that distances are those of the whole array; None if empty."""
    values = region_XYZ.view(torch.uint8) if region_XYZ.dtype == torch.bool else region_XYZ
    flat_YZ = values.amax(dim=0)
    hits = [p.nonzero() for p in (values.flatten(1).amax(dim=1), flat_YZ.amax(dim=1), flat_YZ.amax(dim=0))]
    if len(hits[0]) == 0:
        return None
    x, y, z = (
        slice(max(int(hit[0]) - 1, 0), min(int(hit[-1]) + 2, n)) for hit, n in zip(hits, region_XYZ.shape, strict=True)
    )
    return x, y, z


def next_click(label_XYZ: Tensor, mask_XYZ: Tensor, rng: np.random.Generator) -> Click | None:
    """The click that a person would make next, by the law at the top; None where the mask is the label.

    Args:
        label_XYZ: Where the structure is, bool.
        mask_XYZ: Where the network says it is, bool, on the same device.
        rng: Asked for two numbers.
    """
    box = _box(label_XYZ ^ mask_XYZ)
    if box is None:
        return None
    label, mask = label_XYZ[box], mask_XYZ[box]
    missed, extra = label & ~mask, mask & ~label
    positive = bool(missed.count_nonzero() >= extra.count_nonzero())
    point = draw_voxel(missed if positive else extra, rng)
    assert point is not None  # the larger error has voxels
    x, y, z = (n + part.start for n, part in zip(point, box, strict=True))
    return Click((x, y, z), positive)


def simulate_clicks(
    image_B1XYZ: Tensor,
    label_B1XYZ: Tensor,
    forward: Callable[[Tensor], Tensor],
    spec: ClicksSpec,
    rngs: Sequence[np.random.Generator],
) -> Tensor:
    """The network's input for an optimisation step, `[B, 3, X, Y, Z]`, with the clicks that training simulates.

    The first click is drawn in the label. In round j of N, counted from 0, each image gets another one with
    probability 1 - j / N, where the network's mask is wrong. Images without a click in a round do not go through the
    network in it: their mask would not be used.

    Args:
        image_B1XYZ: CT patches.
        label_B1XYZ: Above 0 where the structure is; not empty in any patch.
        forward: The network as it is, without gradients: input to logits `[B, 1, X, Y, Z]`.
        spec: Number of rounds and width of the maps.
        rngs: A generator for each patch.
    """
    label_BXYZ = label_B1XYZ[:, 0] > 0
    clicks: list[list[Click]] = []
    for label_XYZ, rng in zip(label_BXYZ, rngs, strict=True):
        first = draw_voxel(label_XYZ, rng)
        clicks.append([] if first is None else [Click(first)])
    for number in range(spec.num_clicks):
        chosen = [n for n, rng in enumerate(rngs) if rng.random() < 1 - number / spec.num_clicks]
        if not chosen:
            continue
        logits = forward(network_input(image_B1XYZ[chosen], [clicks[n] for n in chosen], spec.sigma_voxels))
        for n, mask_XYZ in zip(chosen, logits[:, 0] > 0, strict=True):
            click = next_click(label_BXYZ[n], mask_XYZ, rngs[n])
            if click is not None:
                clicks[n].append(click)
    return network_input(image_B1XYZ, clicks, spec.sigma_voxels)
