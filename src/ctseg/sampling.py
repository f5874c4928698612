"""Random patches and augmentation for training.

Randomness has no state: it is a function of (seed, purpose, epoch, ...), so that a resumed training draws exactly
what the uninterrupted one would have drawn. Positions are drawn on the host from memory-mapped arrays (a few reads),
patches are cut and shifted on the device that holds the case: no step waits for the other side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ctseg.specs import Augmentation, Sampling

ORDER, PATCHES, NETWORK = range(3)
"""Purposes of random streams: order of cases, patches and augmentation, the network's own (dropout)."""

Start = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class CaseArrays:
    """A prepared training case.

    Attributes:
        image_XYZ: float16 in 0..1, on the engine's device or memory-mapped.
        label_XYZ: uint8, likewise.
        host_image, host_label: The same as NumPy arrays (memory-mapped), for drawing positions.
        foreground: int32 flat indices (C order) of voxels with a label above 0.
    """

    name: str
    image_XYZ: Tensor
    label_XYZ: Tensor
    host_image: NDArray[np.float16]
    host_label: NDArray[np.uint8]
    foreground: NDArray[np.int32]


@dataclass(frozen=True)
class Draw:
    """One patch of a step: which case, where, and how its intensity is shifted."""

    case: int
    start: Start
    shift: float


def generator(seed: int, purpose: int, *position: int) -> np.random.Generator:
    """A generator for one place in the training, independent of all others."""
    return np.random.default_rng(np.random.SeedSequence([seed, purpose, *position]))


def epoch_batches(num_cases: int, batch_cases: int, seed: int, epoch: int) -> list[list[int]]:
    """The epoch's steps, each a list of case indices: all cases once in random order; the last step may be smaller."""
    order = generator(seed, ORDER, epoch).permutation(num_cases).tolist()
    return [order[n : n + batch_cases] for n in range(0, num_cases, batch_cases)]


def draw_step(
    cases: list[CaseArrays], batch: list[int], sampling: Sampling, augmentation: Augmentation, seed: int, epoch: int
) -> list[Draw]:
    """All patches of one step: `patches_per_case` from each case of `batch`, in order."""
    draws = []
    for index in batch:
        rng = generator(seed, PATCHES, epoch, index)
        for _ in range(sampling.patches_per_case):
            start = draw_start(cases[index], sampling, rng)
            shifted = rng.random() < augmentation.shift_probability
            shift = rng.uniform(-augmentation.shift_offset, augmentation.shift_offset) if shifted else 0.0
            draws.append(Draw(index, start, float(shift)))
    return draws


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


def _background_voxel(case: CaseArrays, rng: np.random.Generator, tries: int = 64, rounds: int = 64) -> int:
    """A random voxel of the background inside the body, by rejection; any voxel if there is practically none."""
    image, label = case.host_image.reshape(-1), case.host_label.reshape(-1)
    for _ in range(rounds):
        candidates = rng.integers(label.size, size=tries)
        good = candidates[(label[candidates] == 0) & (image[candidates] > 0)]
        if len(good):
            return int(good[0])
    return int(rng.integers(label.size))


def cut_batch(
    cases: list[CaseArrays], draws: list[Draw], sampling: Sampling, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The patches of `draws`: image_B1XYZ float32 with shifts applied, label_B1XYZ uint8, on `device`.

    A case smaller than the patch is padded with zeros on both sides.
    """
    images = [cut_patch(cases[d.case].image_XYZ, d.start, sampling.patch_size) for d in draws]
    labels = [cut_patch(cases[d.case].label_XYZ, d.start, sampling.patch_size) for d in draws]
    shifts = torch.tensor([d.shift for d in draws], dtype=torch.float32).view(-1, 1, 1, 1, 1)
    image_B1XYZ = torch.stack(images).unsqueeze(1).to(device, non_blocking=True).float()
    image_B1XYZ += shifts.to(device, non_blocking=True)
    return image_B1XYZ, torch.stack(labels).unsqueeze(1).to(device, non_blocking=True)


def cut_patch(values_XYZ: Tensor, start: Start, size: tuple[int, int, int]) -> Tensor:
    """The box of `size` at `start`, padded with zeros (half before, half after) where the array is smaller."""
    patch = values_XYZ[tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))]
    missing = [n - have for n, have in zip(size, patch.shape, strict=True)]
    if any(missing):
        pads = [(m // 2, m - m // 2) for m in missing]
        patch = functional.pad(patch, [p for pair in reversed(pads) for p in pair])
    return patch
