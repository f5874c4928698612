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
from numpy.typing import NDArray
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
    distance, counts = _levels(region_XYZ)
    return distance.to(torch.int16) if counts[1] < distance.numel() else distance.to(torch.int16).neg_()


def _levels(region_XYZ: Tensor) -> tuple[Tensor, NDArray[np.float64]]:
    """`chessboard_distance`, and how many voxels of the region lie at each; 1 for all where it fills the array."""
    left = region_XYZ.to(torch.uint8, copy=True, memory_format=torch.contiguous_format)
    at_least = [_count(left)]
    distance = left.to(torch.uint8 if max(left.shape) <= 255 else torch.int16, copy=True)  # a byte is far faster
    erode = _erode if _touches_a_face(left) else _erode_inside
    spare = torch.zeros_like(left)
    while 0 < at_least[-1] < left.numel():
        left, spare = erode(left, spare)
        distance += left
        at_least.append(_count(left))
    return distance, np.concatenate([[0.0], -np.diff([*at_least, 0.0])])[: max(len(at_least), 2)]


def _count(region_XYZ: Tensor) -> int:
    """How many voxels a region of 0 and 1 has; on the host NumPy counts far faster."""
    if region_XYZ.is_cpu:
        return int(np.count_nonzero(region_XYZ.view(torch.bool).numpy()))
    return int(region_XYZ.count_nonzero())


def _nth(values_XYZ: Tensor, value: int, number: int) -> Point:
    """Where an array has `value` for the `number`-th time, counted from 0, z fastest."""
    if values_XYZ.is_cpu:
        flat = int(np.flatnonzero(values_XYZ.numpy() == value)[number])
        x, y, z = (int(n) for n in np.unravel_index(flat, values_XYZ.shape))
        return x, y, z
    x, y, z = (values_XYZ == value).nonzero()[number].tolist()
    return x, y, z


def _touches_a_face(region_XYZ: Tensor) -> bool:
    """Faces of an axis of one voxel, as in a 2D image, do not count: nothing lies beyond them in any direction."""
    axes = [axis for axis, length in enumerate(region_XYZ.shape) if length > 1]
    return any(bool(region_XYZ.select(axis, end).any()) for axis in axes for end in (0, -1))


def _erode(region_XYZ: Tensor, spare_XYZ: Tensor) -> tuple[Tensor, Tensor]:
    """The region without the voxels that have a neighbour outside, of 26; one axis after another. And a spare array."""
    for axis, length in enumerate(region_XYZ.shape):
        spare_XYZ.copy_(region_XYZ)
        spare_XYZ.narrow(axis, 1, length - 1).bitwise_and_(region_XYZ.narrow(axis, 0, length - 1))
        spare_XYZ.narrow(axis, 0, length - 1).bitwise_and_(region_XYZ.narrow(axis, 1, length - 1))
        region_XYZ, spare_XYZ = spare_XYZ, region_XYZ
    return region_XYZ, spare_XYZ


def _erode_inside(region_XYZ: Tensor, spare_XYZ: Tensor) -> tuple[Tensor, Tensor]:
    """The same for a region that touches no face of its array, where the spare array is empty too, and much faster.

    The arrays are taken as one row of voxels: what follows the end of a line is the beginning of the next one, which is
    outside as well.
    """
    for length, stride in zip(region_XYZ.shape, region_XYZ.stride(), strict=True):
        if length == 1:
            continue
        row, eroded = region_XYZ.view(-1), spare_XYZ.view(-1)[stride:-stride]
        torch.bitwise_and(row[stride:-stride], row[: -2 * stride], out=eroded)
        eroded &= row[2 * stride :]
        region_XYZ, spare_XYZ = spare_XYZ, region_XYZ
    return region_XYZ, spare_XYZ


def draw_voxel(region_XYZ: Tensor, rng: np.random.Generator) -> Point | None:
    """A voxel of the region, drawn by the law at the top of this module; None where the region is empty."""
    box = _box(region_XYZ)
    if box is None:
        return None
    distance, counts = _levels(region_XYZ[box])
    chosen = _level(counts, rng.random())
    x, y, z = _nth(distance, chosen, min(int(rng.random() * counts[chosen]), int(counts[chosen]) - 1))
    return x + box[0].start, y + box[1].start, z + box[2].start


def _level(counts: NDArray[np.float64], uniform: float) -> int:
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
    wrong_XYZ = label_XYZ ^ mask_XYZ
    box = _box(wrong_XYZ)
    if box is None:
        return None
    wrong, missed = wrong_XYZ[box], wrong_XYZ[box] & label_XYZ[box]
    positive = 2 * _count(missed) >= _count(wrong)
    point = draw_voxel(missed if positive else wrong ^ missed, rng)
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
