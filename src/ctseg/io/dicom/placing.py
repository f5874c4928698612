"""From what SEG and RTSTRUCT objects say about single images to a label map on the grid of the CT."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ctseg.io.dicom.read import DicomCT
from ctseg.io.dicom.series import Slice

PLANE_TOLERANCE = 0.1
"""A plane is a slice's own when it lies within this share of the distance between slices from it."""
IN_PLANE_TOLERANCE = 0.05
"""Pixels of two images are the same when their first ones lie within this share of a pixel from each other."""
AXES_TOLERANCE = 1e-3
"""Largest difference between elements of two unit vectors that count as one."""


def planes(ct: DicomCT) -> list[Slice]:
    """The image on every slice of the volume; where a gap was filled, one as it would be between its neighbours."""
    images = list(ct.slices)
    present = [z for z, image in enumerate(images) if image is not None]
    for z in range(len(images)):
        if images[z] is None:
            below, above = max(n for n in present if n < z), min(n for n in present if n > z)
            low, high = ct.slices[below], ct.slices[above]
            assert low is not None
            assert high is not None
            step_mm = (high.position_mm - low.position_mm) / (above - below)
            images[z] = dataclasses.replace(low, position_mm=low.position_mm + (z - below) * step_mm)
    return [image for image in images if image is not None]


@dataclass(frozen=True, eq=False)
class Stack:
    """The images that a CT was made of, to be found by their place.

    Attributes:
        slices: At least one; parallel, alike in size and spacing.
        heights_mm: `(slices,)`: where each lies along the normal.
        tolerance_mm: How far a plane may lie from an image to be its own.
    """

    slices: Sequence[Slice]
    heights_mm: NDArray[np.float64]
    tolerance_mm: float

    @classmethod
    def of(cls, slices: Sequence[Slice]) -> Stack:
        """The stack of `slices`, in their order."""
        heights: NDArray[np.float64] = np.array([image.position_mm for image in slices]) @ slices[0].normal
        increments = np.diff(np.sort(heights))
        spacing_mm = float(np.median(increments)) if len(increments) else float(min(slices[0].spacing_mm))
        return cls(slices, heights, PLANE_TOLERANCE * spacing_mm)

    def find(self, height_mm: float) -> tuple[int, float]:
        """The image nearest to a plane: its index, and how far the plane is away."""
        apart_mm = np.abs(self.heights_mm - height_mm)
        index = int(apart_mm.argmin())
        return index, float(apart_mm[index])


def on_grid(ct: DicomCT, stack: NDArray[np.uint8], drawn: set[int]) -> NDArray[np.uint8]:
    """Labels of the images of `planes`, `[image, x, y]`, on the CT's grid `[x, y, z]`.

    Where a tilted series was sheared its labels are too, by the nearest pixel. A slice that filled a gap takes the
    labels of the nearest image, unless it is among `drawn`: something was drawn in the gap.
    """
    images = planes(ct)
    present = np.array([z for z, image in enumerate(ct.slices) if image is not None])
    labels = np.zeros(ct.volume.geometry.size, np.uint8, order="F")
    for z in range(len(images)):
        n = z if z in drawn else int(present[np.abs(present - z).argmin()])
        _paste(stack[n], labels[:, :, z], _shift(ct, images[n], n))
    return labels


def _shift(ct: DicomCT, image: Slice, z: int) -> tuple[int, int]:
    """Which pixel (x, y) of the volume's slice `z` the first pixel of its source is."""
    corner = ct.volume.geometry.affine[:3] @ [0.0, 0.0, float(z), 1.0]
    x, y = np.round(image.axes @ (image.position_mm - corner) / image.spacing_mm).astype(int)
    return int(x), int(y)


def _paste(source: NDArray[np.uint8], target: NDArray[np.uint8], shift: tuple[int, int]) -> None:
    """Copies `source` into `target` with its first pixel at `shift`; what lies outside is cut off."""
    to, from_ = [], []
    for offset, have, room in zip(shift, source.shape, target.shape, strict=True):
        begin, end = max(offset, 0), min(offset + have, room)
        to.append(slice(begin, max(begin, end)))
        from_.append(slice(begin - offset, max(begin, end) - offset))
    target[tuple(to)] = source[tuple(from_)]
