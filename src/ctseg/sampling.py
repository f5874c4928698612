"""Random patches and augmentation for training.

Randomness has no state: it is a function of (seed, purpose, epoch, ...), so that a resumed training draws exactly
what the uninterrupted one would have drawn. Positions are drawn on the host from memory-mapped arrays (a few reads),
patches are cut and shifted on the device that holds the case: no step waits for the other side.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ctseg.arrays import cut_box
from ctseg.regions import Region, inside, region_around, region_size
from ctseg.specs import Augmentation, Sampling

ORDER, PATCHES, NETWORK, CLICKS, VALIDATION_CLICKS = range(5)
"""Purposes of random streams: order of cases, patches and augmentation, the network's own (dropout), clicks."""

Start = tuple[int, int, int]


@dataclass(frozen=True)
class Organ:
    """The one structure of a case that is the label, where clicks say which: see `engine.samples`.

    Attributes:
        value: In the case's label map.
        low, high: The corners of its box, in voxels.
        margin: Voxels around it that a patch which does not hold it is grown by.
        partial_fraction: Share of patches that need not hold all of it.
    """

    value: int
    low: Start
    high: Start
    margin: int
    partial_fraction: float


@dataclass(frozen=True, eq=False)
class CaseArrays:
    """A prepared training case.

    Attributes:
        image_XYZ: float16 in 0..1, on the engine's device or memory-mapped.
        label_XYZ: uint8, likewise.
        host_image, host_label: The same as NumPy arrays (memory-mapped), for drawing positions.
        foreground: int32 flat indices (C order) of voxels with a label above 0.
        weight: How often the case is drawn, in relation to the others.
        organ: Where given, label is what has its value, and `foreground` holds its voxels only.
    """

    name: str
    image_XYZ: Tensor
    label_XYZ: Tensor
    host_image: NDArray[np.float16]
    host_label: NDArray[np.uint8]
    foreground: NDArray[np.int32]
    weight: float = 1.0
    organ: Organ | None = None


@dataclass(frozen=True)
class Draw:
    """One patch of a step: which case, where, how its intensity is shifted and how it is turned.

    Attributes:
        flips: Which of x, y, z are mirrored.
        turns: Quarter turns in the x-y plane, after the flips.
        size: Of the box that is cut, where it is another than the patch's and resampled to that.
    """

    case: int
    start: Start
    shift: float = 0.0
    flips: tuple[bool, bool, bool] = (False, False, False)
    turns: int = 0
    size: Start | None = None


def generator(seed: int, purpose: int, *position: int) -> np.random.Generator:
    """A generator for one place in the training, independent of all others."""
    return np.random.default_rng(np.random.SeedSequence([seed, purpose, *position]))


def epoch_batches(weights: list[float], batch_cases: int, seed: int, epoch: int) -> list[list[int]]:
    """The epoch's steps, each a list of case indices; the last step may be smaller.

    Cases of equal weight all come once, in random order. Otherwise as many cases as there are come, each drawn anew
    with a probability proportional to its weight.
    """
    rng, number = generator(seed, ORDER, epoch), len(weights)
    if len(set(weights)) == 1:
        order = rng.permutation(number).tolist()
    else:
        order = rng.choice(number, size=number, p=np.asarray(weights) / np.sum(weights)).tolist()
    return [order[n : n + batch_cases] for n in range(0, number, batch_cases)]


def draw_step(
    cases: list[CaseArrays],
    batch: list[int],
    sampling: Sampling,
    augmentation: Augmentation,
    seed: int,
    place: tuple[int, int],
) -> list[Draw]:
    """All patches of one step, `place` = (epoch, step): `patches_per_case` from each case of `batch`, in order."""
    draws = []
    for n, index in enumerate(batch):
        rng = generator(seed, PATCHES, *place, n)
        draws += [_draw(index, cases[index], sampling, augmentation, rng) for _ in range(sampling.patches_per_case)]
    return draws


def _draw(
    index: int, case: CaseArrays, sampling: Sampling, augmentation: Augmentation, rng: np.random.Generator
) -> Draw:
    region = None if case.organ is None else draw_region(case, case.organ, sampling, rng)
    start = draw_start(case, sampling, rng) if region is None else region.start
    shifted, turned, *flipped = rng.random(5)
    offset, turns = rng.uniform(-augmentation.shift_offset, augmentation.shift_offset), int(rng.integers(1, 4))
    flip_x, flip_y, flip_z = (bool(value < augmentation.flip_probability) for value in flipped)
    return Draw(
        case=index,
        start=start,
        shift=float(offset) if shifted < augmentation.shift_probability else 0.0,
        flips=(flip_x, flip_y, flip_z),
        turns=turns if turned < augmentation.rotate90_probability else 0,
        size=None if region is None or region.size == sampling.patch_size else region.size,
    )


def draw_start(case: CaseArrays, sampling: Sampling, rng: np.random.Generator) -> Start:
    """First voxel of a patch centred on a random foreground or background voxel, moved inside the case.

    As MONAI's RandCropByPosNegLabel: foreground with probability `positive_fraction`, else a voxel without label
    whose intensity is above 0. A case without foreground gives background only.
    """
    positive = rng.random() < sampling.positive_fraction and len(case.foreground) > 0
    flat = int(case.foreground[rng.integers(len(case.foreground))]) if positive else _background_voxel(case, rng)
    centre = np.unravel_index(flat, case.host_label.shape)
    limits = zip(centre, sampling.patch_size, case.host_label.shape, strict=True)
    x, y, z = (int(min(max(c - size // 2, 0), max(length - size, 0))) for c, size, length in limits)
    return x, y, z


def draw_region(case: CaseArrays, organ: Organ, sampling: Sampling, rng: np.random.Generator) -> Region:
    """A region around one of the organ's voxels: of a patch's size, or moved and grown to hold the whole organ."""
    shape = _triple(case.host_label.shape)
    flat = int(case.foreground[rng.integers(len(case.foreground))])
    centre = _triple(int(n) for n in np.unravel_index(flat, shape))
    if rng.random() < organ.partial_fraction:
        return region_around(centre, centre, shape, sampling.patch_size, 0)
    size = region_size(organ.low, organ.high, sampling.patch_size, organ.margin)
    start = [
        int(min(max(c - n // 2, last + 1 - n), first))
        for c, n, first, last in zip(centre, size, organ.low, organ.high, strict=True)
    ]
    return Region(inside(start, size, shape), size)


def _background_voxel(case: CaseArrays, rng: np.random.Generator) -> int:
    """A random voxel of the background inside the body, by rejection; any voxel if there is practically none."""
    image, label = case.host_image.reshape(-1), case.host_label.reshape(-1)
    for _ in range(64):
        candidates = rng.integers(label.size, size=64)
        good = candidates[(label[candidates] == 0) & (image[candidates] > 0)]
        if len(good):
            return int(good[0])
    return int(rng.integers(label.size))


def cut_batch(
    cases: list[CaseArrays], draws: list[Draw], sampling: Sampling, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The patches of `draws`: image_B1XYZ float32, label_B1XYZ uint8, augmented, on `device`.

    A case smaller than the patch is padded with zeros on both sides.
    """
    home = cases[draws[0].case].image_XYZ.device
    travels = home != device  # as float16, from memory that the GPU can read by itself
    shape = (len(draws), 1, *sampling.patch_size)
    image = torch.empty(shape, dtype=torch.float16 if travels else torch.float32, device=home, pin_memory=travels)
    label = torch.empty(shape, dtype=torch.uint8, device=home, pin_memory=travels)
    for n, draw in enumerate(draws):
        case = cases[draw.case]
        region = Region(draw.start, draw.size or sampling.patch_size)
        image[n, 0].copy_(_turn(cut_region(case.image_XYZ, region, sampling.patch_size), draw))
        label[n, 0].copy_(_turn(_cut_label(case, region, sampling.patch_size), draw))
    image_B1XYZ = image.to(device, non_blocking=True).float()
    for n, draw in enumerate(draws):
        if draw.shift:
            image_B1XYZ[n] += draw.shift
    return image_B1XYZ, label.to(device, non_blocking=True)


def _cut_label(case: CaseArrays, region: Region, window: Start) -> Tensor:
    if case.organ is None:
        return cut_region(case.label_XYZ, region, window)
    label_XYZ = cut_box(case.label_XYZ, _triple(max(n, 0) for n in region.start), region.size) == case.organ.value
    return _resized(label_XYZ.to(torch.uint8), window, "nearest-exact")


def cut_region(values_XYZ: Tensor, region: Region, window: Start) -> Tensor:
    """The values in a region, padded with zeros, in linear interpolation on the window's grid if that is another."""
    patch_XYZ = cut_box(values_XYZ, _triple(max(n, 0) for n in region.start), region.size)
    return patch_XYZ if region.size == window else _resized(patch_XYZ.float(), window, "trilinear")


def _resized(patch_XYZ: Tensor, size: Start, mode: str) -> Tensor:
    return (
        patch_XYZ if patch_XYZ.shape == size else functional.interpolate(patch_XYZ[None, None], size, mode=mode)[0, 0]
    )


def _triple(values: Iterable[int]) -> Start:
    x, y, z = values
    return x, y, z


def _turn(patch_XYZ: Tensor, draw: Draw) -> Tensor:
    axes = [axis for axis, flipped in enumerate(draw.flips) if flipped]
    flipped = patch_XYZ.flip(axes) if axes else patch_XYZ
    return flipped.rot90(draw.turns, (0, 1)) if draw.turns else flipped
